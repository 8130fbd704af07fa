# Copyright © 2026 MLX Contributors

"""Rows with the token ids that a model wrote train on these, not on their text's."""

import unittest
from unittest import mock

import tiny  # noqa: F401
from tokenizers_for_tests import no_template_tokenizer, thinking_tokenizer

from mlx_lm.tuner.datasets import PreferenceDataset

QUESTION = [{"role": "user", "content": "Tea?"}]


def said(text):
    return [{"role": "assistant", "content": text}]


class TestGivenTokens(unittest.TestCase):
    def setUp(self):
        self.tokenizer = thinking_tokenizer()
        # Two bytes where the tokenizer would have merged them into one token.
        self.split = [self.tokenizer.convert_tokens_to_ids(x) for x in "the"]
        self.end = self.tokenizer.eos_token_id

    def read(self, rows, **options):
        tokenizer = options.pop("tokenizer", self.tokenizer)
        return PreferenceDataset(rows, tokenizer, max_bad_rows=0, **options)

    def row(self, **more):
        row = {"prompt": QUESTION, "chosen": said("the"), "rejected": said("a")}
        return {**row, **more}

    def test_ids_follow_the_prompt_of_generation(self):
        given = [*self.split, self.end]
        # Cut at a limit: no end.
        cut = self.tokenizer.encode("a")
        data = self.read([self.row(chosen_tokens=given, rejected_tokens=cut)])
        prompt, chosen, rejected, _ = data[0]
        expected = self.tokenizer.apply_chat_template(
            QUESTION, add_generation_prompt=True, return_dict=False
        )
        self.assertEqual(prompt.tolist(), expected)
        self.assertEqual(chosen.tolist(), given)
        self.assertEqual(rejected.tolist(), cut)
        # The text has other ids, and what the template writes behind the end.
        text = self.read([self.row()])[0]
        self.assertNotEqual(text[1].tolist(), given)
        self.assertEqual(text[0].tolist(), expected)

    def test_one_answer_of_text(self):
        given = [*self.split, self.end]
        data = self.read([self.row(chosen_tokens=given)])
        text = self.read([self.row()])
        self.assertEqual(data[0][1].tolist(), given)
        self.assertEqual(data[0][2].tolist(), text[0][2].tolist())

    def test_ids_of_another_text_or_tokenizer_are_not_used(self):
        text = self.read([self.row()])[0]
        for ids in ([5, 6, 7], [10**6], [*self.split, self.end, self.end]):
            data = self.read([self.row(chosen_tokens=ids)])
            self.assertEqual(data[0][1].tolist(), text[1].tolist(), ids)
            (warning,) = [x for x in data.summary() if "token ids" in x]
            self.assertIn("1 row the token ids of an answer are not", warning)
            # As sentencepiece does.
            strict = mock.Mock(side_effect=IndexError("piece id is out of range."))
            with mock.patch.object(self.tokenizer, "decode", strict):
                data = self.read([self.row(chosen_tokens=ids)])
            self.assertEqual(data[0][1].tolist(), text[1].tolist())

    def test_columns_of_another_kind_are_let_be(self):
        text = self.read([self.row()])
        for value in (3, [], [True], [1.5], [-1], {"a": 1}):
            data = self.read([self.row(chosen_tokens=value)])
            self.assertEqual(data[0][1].tolist(), text[0][1].tolist())
            self.assertEqual(data.summary(), text.summary())

    def test_a_thought_that_was_cut(self):
        # No template writes it, but its ids are known.
        ids = self.tokenizer.encode("<think>the")
        row = self.row(chosen=said("<think>the"), chosen_tokens=ids)
        self.assertEqual(self.read([row])[0][1].tolist(), ids)

    def test_rankings_and_labels(self):
        answers = ["the", "a", "in"]
        ids = [[*self.split, self.end], None, self.tokenizer.encode("in")]
        row = {
            "prompt": QUESTION,
            "ranking": [said(x) for x in answers],
            "ranking_tokens": ids,
        }
        pairs = self.read([row])
        self.assertEqual([pairs[i][1].tolist() for i in (0, 1)], [ids[0]] * 2)
        self.assertEqual([pairs[i][2].tolist() for i in (1, 2)], [ids[2]] * 2)
        row = self.row(chosen_tokens=ids[0])
        other = {**row, "prompt": [{"role": "user", "content": "Milk?"}]}
        labels = self.read([row, other], kind="labels")
        found = [labels[i][1].tolist() for i in range(len(labels))]
        self.assertEqual(found.count(ids[0]), 2)

    def test_text_prompts(self):
        tokenizer = no_template_tokenizer()
        split = [tokenizer.convert_tokens_to_ids(x) for x in "the"]
        row = {"prompt": "Tea:", "chosen": "the", "rejected": "a"}
        data = self.read([{**row, "chosen_tokens": split}], tokenizer=tokenizer)
        self.assertEqual(data[0][0].tolist(), tokenizer.encode("Tea:"))
        self.assertEqual(data[0][1].tolist(), split)
        self.assertEqual(data[0][2].tolist()[-1], tokenizer.eos_token_id)


if __name__ == "__main__":
    unittest.main()
