# Copyright © 2026 MLX Contributors

import unittest
from dataclasses import fields

import numpy as np
from test_preference_dataset import make_tokenizer

from mlx_lm import dpo
from mlx_lm.preference.data.options import RowOptions, row_arguments
from mlx_lm.preference.data.tokenize import TOO_LONG, RowNotes, counted
from mlx_lm.preference.data.tokenizer import PairTokenizer, show_pair
from mlx_lm.preference.errors import InputError
from mlx_lm.preference.setting import declared

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
    def test_refused(self):
        for options, text in (
            ({"transcripts": "both"}, "'turns' or 'raw'"),
            ({"max_bad_rows": 1.5}, "between 0 and 1"),
            ({"wrap_text": True, "transcripts": "raw"}, "exclude each other"),
            ({"criteria": {"a": 0}}, "criteria needs a weight above 0"),
            ({"wrap_text": "no"}, "wrap_text must be true or false, got 'no'"),
            ({"max_bad_rows": "0.5"}, "max_bad_rows must be a number, got '0.5'"),
            ({"max_bad_rows": True}, "max_bad_rows must be a number, got True"),
            ({"chosen_feature": None}, "chosen_feature must be text, got None"),
            ({"margin_feature": 3}, "margin_feature must be text, got 3"),
        ):
            with self.subTest(text=text), self.assertRaisesRegex(InputError, text):
                RowOptions(**options)

    def test_a_dataset_has_its_own(self):
        options = RowOptions(wrap_text=True, max_bad_rows=0)
        own = {"path": "x", "chosen_feature": "good", "max_bad_rows": None}
        expected = RowOptions(wrap_text=True, max_bad_rows=0, chosen_feature="good")
        self.assertEqual(options.updated(own), expected)

    def test_every_one_may_stand_in_hf_dataset(self):
        names = [one.name for one in declared(RowOptions) if one.per_dataset]
        self.assertEqual(names, [one.name for one in fields(RowOptions)])

    def test_entries_are_checked_before_anything_loads(self):
        for own, text in (
            ({"max_bad_rows": "0.5"}, "max_bad_rows must be a number, got '0.5'"),
            ({"wrap_text": True}, "wrap_text: true and transcripts: raw exclude"),
        ):
            args = dpo.resolve_args(["--train"])
            args.hf_dataset, args.transcripts = {"path": "x", **own}, "raw"
            with self.subTest(text=text), self.assertRaisesRegex(InputError, text):
                dpo.run(args)

    def test_tokenizer_and_kind(self):
        tokenizer = PairTokenizer(make_tokenizer())
        for options, kind, text in (
            ({"wrap_text": True}, "pairs", "chat template"),
            ({}, "pages", "kind must be one of pairs"),
            ({"criteria": {"a": 1}}, "labels", "criteria belongs to pairs"),
            ({"margin_feature": "m"}, "rankings", "margin_feature belongs to pairs"),
        ):
            with self.subTest(text=text), self.assertRaisesRegex(InputError, text):
                row_arguments(RowOptions(**options), tokenizer, kind)


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
