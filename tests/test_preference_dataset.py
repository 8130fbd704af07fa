# Copyright © 2026 MLX Contributors

import unittest

import numpy as np
from byte_tokenizers import (
    CHATML,
    STRICT,
    USER,
    make_tokenizer,
    pair,
    text_of,
)

from mlx_lm.preference.data.sources import LocatedRows
from mlx_lm.preference.errors import InputError
from mlx_lm.tuner.datasets import PreferenceDataset


class TestPreferenceDataset(unittest.TestCase):
    def test_truncation(self):
        rows = [pair("12345678", "abcdef", "ab"), pair("123", "abcdefgh", "abcdefgi")]
        dataset = PreferenceDataset(rows, make_tokenizer(), max_length=10)
        self.assertEqual([d[3] for d in dataset], [(8, 10, 10), (3, 10, 10)])
        self.assertEqual(
            [text_of(dataset.tokenizer, ids) for ids in dataset[0][:3]],
            ["12345678", "ab", "ab"],
        )
        summary = "\n".join(dataset.summary())
        self.assertIn("Cut to 10 tokens: 2 pairs.", summary)
        self.assertIn("2 pairs have equal answers after the cut", summary)
        # A prompt that fills max_length is dropped, and no fault.
        dataset = PreferenceDataset(rows, make_tokenizer(), max_length=8)
        self.assertEqual(len(dataset), 1)
        self.assertEqual(dataset.skipped, {"prompt fills max_length": 1})
        self.assertEqual(dataset.first_skipped, {"prompt fills max_length": 0})
        with self.assertRaisesRegex(InputError, "Raise max_seq_length, which is 8"):
            PreferenceDataset(rows[:1], make_tokenizer(), max_length=8)

    def test_items(self):
        rows = [pair(), pair("long prompt", "a", "b"), pair(chosen="c", rejected="d!")]
        dataset = PreferenceDataset(rows, make_tokenizer())
        self.assertEqual(len(dataset), 3)
        self.assertEqual([dataset.itemlen(i) for i in range(3)], [7, 13, 5])
        for prompt, chosen, rejected, lengths in dataset:
            size = len(prompt)
            self.assertEqual(lengths, (size, size + len(chosen), size + len(rejected)))
            self.assertEqual(prompt.dtype, np.int32)
        self.assertEqual(dataset.source_row(2), 2)
        with self.assertRaises(IndexError):
            dataset[3]

    def test_skipped_rows(self):
        rows = [pair() for _ in range(18)] + [pair(chosen=""), {"text": "x"}]
        located = LocatedRows(rows, "train.jsonl")
        dataset = PreferenceDataset(located, make_tokenizer())
        self.assertEqual(len(dataset), 18)
        self.assertEqual(dataset.skipped, {"empty answer": 1, "unknown columns": 1})
        self.assertEqual(dataset.first_skipped["empty answer"], "train.jsonl:19")
        self.assertEqual(dataset.source_row(17), "train.jsonl:18")
        self.assertIn(
            "[WARNING] Skipped 1 row: unknown columns (first: train.jsonl:20, text).",
            dataset.summary(),
        )

    def test_too_many_bad_rows(self):
        rows = [pair() for _ in range(8)] + [pair(chosen=None)] * 2
        with self.assertRaises(ValueError) as caught:
            PreferenceDataset(rows, make_tokenizer())
        message = str(caught.exception)
        self.assertIn("2 rows: value is None (first: row 8", message)
        self.assertNotIn("\n", message)
        dataset = PreferenceDataset(rows, make_tokenizer(), max_bad_rows=0.2)
        self.assertEqual(len(dataset), 8)

    def test_no_usable_row(self):
        known = "Known columns: prompt, chosen, rej.* named by prompt_feature, chosen_f"
        with self.assertRaisesRegex(ValueError, known):
            PreferenceDataset([{"text": "a"}], make_tokenizer(), max_bad_rows=1)
        with self.assertRaisesRegex(ValueError, "has no rows"):
            PreferenceDataset([], make_tokenizer())
        with self.assertRaisesRegex(ValueError, "need a chat template"):
            row = {"prompt": USER, "chosen": "a", "rejected": "b"}
            PreferenceDataset([row], make_tokenizer())

    def test_template_errors_are_skipped(self):
        chat = {"prompt": USER, "chosen": "yes", "rejected": "no"}
        broken = {**chat, "prompt": [{"role": "assistant", "content": "Hi"}]}
        tokenizer = make_tokenizer(STRICT + CHATML)
        dataset = PreferenceDataset([chat] * 9 + [broken], tokenizer)
        self.assertEqual(dataset.skipped, {"chat template failed": 1})
        self.assertIn("roles must alternate", "\n".join(dataset.summary()))

    def test_answers_that_are_nothing_to_the_model(self):
        template = CHATML.replace("m.content", "m.content | lower")
        chat = {"prompt": USER, "chosen": "Yes", "rejected": "no"}
        same = {**chat, "rejected": "yes"}
        dataset = PreferenceDataset([chat] * 9 + [same], make_tokenizer(template))
        self.assertEqual(dataset.skipped, {"equal answers": 1})
        # A template that leaves out what the assistant says.
        template = (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
        )
        with self.assertRaisesRegex(ValueError, "empty answer"):
            PreferenceDataset([chat], make_tokenizer(template))

    def test_format_shape_and_preview(self):
        tokenizer = make_tokenizer(CHATML)
        dataset = PreferenceDataset([pair(prompt="x" * 40 + "end\n")], tokenizer)
        self.assertEqual((dataset.format, dataset.shape), ("text", "text"))
        self.assertIn("wrap_text", dataset.summary()[-1])
        prompt, chosen, rejected = dataset.preview().splitlines()
        self.assertTrue(prompt.startswith("prompt") and prompt.endswith("xend\\n'"))
        self.assertLess(len(prompt), 60)
        long = PreferenceDataset([pair(chosen=" yes" * 9)], tokenizer).preview()
        self.assertIn("chosen   ' yes yes yes yes' … 'yes yes</s>'", long)
        self.assertEqual(chosen.split(maxsplit=1)[1], "' yes</s>'")
        self.assertEqual(rejected.split(maxsplit=1)[1], "' no</s>'")
        dataset = PreferenceDataset([pair()], tokenizer, wrap_text=True)
        self.assertEqual(dataset.format, "wrapped text")
        self.assertFalse(any("wrap_text" in line for line in dataset.summary()))
        # Its end of a turn is not the token that generation stops at.
        self.assertIn("not taught to stop", dataset.summary()[-1])
        rows = [pair(), *[{"prompt": USER, "chosen": "a", "rejected": "b"}] * 2]
        dataset = PreferenceDataset(rows, tokenizer, source="mixed")
        self.assertEqual((dataset.format, dataset.shape), ("chat", "messages"))
        self.assertIn("2 of messages, chat; 1 of text, text", dataset.summary()[0])

    def test_select_and_concatenate(self):
        rows = [pair(str(i)) for i in range(10)] + [pair(chosen="")]
        dataset = PreferenceDataset(rows, make_tokenizer(), source="a")
        part = dataset.select([7, 1], source="b")
        self.assertEqual([part.source_row(i) for i in range(2)], [7, 1])
        self.assertEqual((part.num_rows, part.skipped), (2, {}))
        both = PreferenceDataset.concatenate([part, dataset, dataset])
        self.assertEqual((len(both), both.num_rows), (22, 24))
        self.assertEqual(both.skipped, {"empty answer": 2})
        self.assertEqual(both.first_skipped, {"empty answer": 10})
        self.assertEqual(both.source, "b, a")
        self.assertEqual(dataset.skipped, {"empty answer": 1})
        self.assertIn("Skipped 2 rows: empty answer", both.summary()[1])

    def test_hold_out(self):
        rows = [pair(str(i // 3), f"yes {i}", f"no {i}") for i in range(300)]
        dataset = PreferenceDataset(rows + [pair(chosen="")], make_tokenizer())
        train, valid = dataset.hold_out(0.1, seed=3)
        self.assertEqual((len(train), len(valid)), (270, 30))
        sides = [{d[0].tobytes() for d in part} for part in (train, valid)]
        self.assertFalse(sides[0] & sides[1])
        places = [[d.source_row(i) for i in range(len(d))] for d in (train, valid)]
        self.assertEqual(sorted(places[0] + places[1]), list(range(300)))
        self.assertEqual((train.num_rows, train.skipped["empty answer"]), (271, 1))
        self.assertEqual(valid.skipped, {})
        again = dataset.hold_out(0.1, seed=3)[1]
        other = dataset.hold_out(0.1, seed=4)[1]
        rows_of = lambda d: [d.source_row(i) for i in range(len(d))]
        self.assertEqual(rows_of(again), places[1])
        self.assertNotEqual(rows_of(other), places[1])

    def test_hold_out_sizes(self):
        tokenizer = make_tokenizer()
        make = lambda prompts: PreferenceDataset([pair(p) for p in prompts], tokenizer)
        for prompts, fraction, size in (
            ("ab", 0.02, 1),
            ("a", 0.02, 0),
            ("abc", 0, 0),
            # One prompt, or none, can't be kept on one side.
            ("aaaa", 0.5, 2),
            ([""] * 4, 0.5, 2),
            ([str(i) for i in range(1100)], 0.5, 500),
        ):
            with self.subTest(rows=len(prompts), fraction=fraction):
                dataset = make(prompts)
                train, valid = dataset.hold_out(fraction)
                self.assertEqual(len(valid), size)
                self.assertEqual(len(train), len(dataset) - size)


if __name__ == "__main__":
    unittest.main()
