# Copyright © 2026 MLX Contributors

"""How the rows of one dataset are read."""

import unittest
from dataclasses import fields

from byte_tokenizers import make_tokenizer

from mlx_lm import dpo
from mlx_lm.preference.data.options import RowOptions, row_arguments
from mlx_lm.preference.data.tokenizer import PairTokenizer
from mlx_lm.preference.errors import InputError
from mlx_lm.preference.setting import declared


class TestRowOptions(unittest.TestCase):
    def test_refused(self):
        for options, text in (
            ({"transcripts": "both"}, "choose from turns, raw"),
            ({"max_bad_rows": 1.5}, "at least 0 and at most 1"),
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


if __name__ == "__main__":
    unittest.main()
