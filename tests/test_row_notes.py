# Copyright © 2026 MLX Contributors

import unittest

import numpy as np

from mlx_lm.preference.data.tokenize import (
    TOO_LONG,
    RowNotes,
    check_row_options,
    counted,
)
from mlx_lm.preference.data.tokenizer import show_pair

BAD = {"empty answer": 3, TOO_LONG: 2}
FIRST: dict[str, str | int] = {"empty answer": "prefs:1", TOO_LONG: 7}
NOTES = RowNotes(20, BAD, FIRST, {"empty answer": "chosen", TOO_LONG: ""}, [5], ["a"])


class TestRowNotes(unittest.TestCase):
    def test_a_line_for_each_reason(self):
        expected = [
            "[WARNING] Skipped 3 rows: empty answer (first: prefs:1, chosen).",
            f"Skipped 2 rows: {TOO_LONG} (first: row 7).",
        ]
        self.assertEqual(NOTES.lines(), expected)

    def test_only_bad_rows_count_as_bad(self):
        NOTES.check("prefs", 15, 8, max_bad_rows=0.15)
        with self.assertRaisesRegex(ValueError, "prefs: 3 of 20 rows are bad.*prefs:1"):
            NOTES.check("prefs", 15, 8, max_bad_rows=0.14)

    def test_nothing_to_use(self):
        with self.assertRaisesRegex(ValueError, "prefs has no rows"):
            RowNotes(0).check("prefs", 0, 8, 1)
        with self.assertRaisesRegex(ValueError, "Raise max_seq_length, which is 8"):
            NOTES.check("prefs", 0, 8, 1)
        short = RowNotes(3, {"empty answer": 3}, FIRST, {"empty answer": ""})
        with self.assertRaisesRegex(ValueError, "no row of 3 .*Known shapes: "):
            short.check("prefs", 0, 8, 1)

    def test_criteria(self):
        NOTES.check_criteria("prefs", ["a"])
        with self.assertRaisesRegex(ValueError, "no row has the criterion 'b'.*: 'a'"):
            NOTES.check_criteria("prefs", ["a", "b"])

    def test_parts_and_sums(self):
        part = NOTES.of_part(4)
        self.assertEqual((part.num_rows, part.lines()), (4, []))
        self.assertEqual((part.dropped_tail, part.criteria), ([5], ["a"]))
        other = RowNotes(2, {"empty answer": 1}, {"empty answer": 9}, {}, [6])
        both = RowNotes.joined([other, NOTES])
        self.assertEqual(both.num_rows, 22)
        self.assertEqual(both.skipped, {"empty answer": 4, TOO_LONG: 2})
        self.assertEqual(both.first_skipped, {"empty answer": 9, TOO_LONG: 7})
        self.assertEqual(both.dropped_tail, [6])

    def test_counted(self):
        self.assertEqual([counted(n, "row") for n in (0, 1)], ["0 rows", "1 row"])


class TestRowOptions(unittest.TestCase):
    class Plain:
        has_chat_template = False

    def test_refused(self):
        for length, options, more, text in (
            (1, {}, {}, "max_length"),
            (8, {"wrap_text": True}, {}, "chat template"),
            (8, {"kind": "pages"}, {}, "kind must be one of pairs"),
            (8, {"kind": "labels", "criteria": {"a": 1}}, {}, "belongs to pairs"),
            (8, {}, {"transcripts": "both"}, "'turns' or 'raw'"),
            (8, {}, {"max_bad_rows": 1.5}, "between 0 and 1"),
        ):
            with self.subTest(text=text), self.assertRaisesRegex(ValueError, text):
                check_row_options(self.Plain, length, options, **more)
        check_row_options(self.Plain, 2, {"margin_feature": "m"})


class TestShowPair(unittest.TestCase):
    class Ids:
        @staticmethod
        def decode(ids):
            return " ".join(map(str, ids))

    def test_long_texts_are_cut_in_the_middle(self):
        ids = np.arange(100)
        prompt, short, long = show_pair(
            self.Ids, ids, {"chosen": ids[:24], "rejected": ids[:25]}
        ).splitlines()
        self.assertTrue(prompt.startswith("prompt   '76 "))
        self.assertTrue(short.endswith(" 23'"))
        self.assertIn(" 15' … '17 ", long)


if __name__ == "__main__":
    unittest.main()
