# Copyright © 2026 MLX Contributors

import itertools
import json
import random
import unittest
from unittest import mock

from byte_tokenizers import (
    BACKENDS,
    CHATML,
    PLAIN,
    THINKING,
    USER,
    make_tokenizer,
    pair,
    text_of,
)
from tokenizers import (
    AddedToken,
    Tokenizer,
)
from transformers import PreTrainedTokenizerFast

from mlx_lm.preference.data.pairs import PreferenceRow
from mlx_lm.preference.data.tokenizer import PairTokenizer, TokenPair
from mlx_lm.preference.errors import InputError
from mlx_lm.tokenizer_utils import NewlineTokenizer, TokenizerWrapper
from mlx_lm.tuner.datasets import PreferenceDataset


class TestTokens(unittest.TestCase):
    def texts(self, row, tokenizer, **options):
        dataset = PreferenceDataset([row], tokenizer, **options)
        return [text_of(tokenizer, ids) for ids in dataset[0][:3]]

    def test_raw_text(self):
        expected = ["Q:", " yes</s>", " no</s>"]
        for tokenizer in (make_tokenizer(), TokenizerWrapper(make_tokenizer())):
            self.assertEqual(self.texts(pair(), tokenizer), expected)
        # The special BOS comes once; an EOS that is there is not doubled.
        self.assertEqual(
            self.texts(pair(rejected=" no</s>"), make_tokenizer(bos=True)),
            ["<s>Q:", " yes</s>", " no</s>"],
        )
        tokenizer = make_tokenizer()
        tokenizer.eos_token = None
        self.assertEqual(self.texts(pair(), tokenizer), ["Q:", " yes", " no"])
        # A model's settings may name an end that its tokenizer doesn't have.
        ids = [tokenizer.convert_tokens_to_ids("</s>"), 10**6]
        tokenizer = TokenizerWrapper(make_tokenizer(), eos_token_ids=ids)
        self.assertEqual(self.texts(pair(), tokenizer), expected)

    def test_empty_prompt(self):
        dataset = PreferenceDataset([pair(prompt="")], make_tokenizer())
        self.assertEqual(dataset[0][3], (0, 5, 4))
        dataset = PreferenceDataset([pair(prompt="")], make_tokenizer(bos=True))
        self.assertEqual(dataset[0][3], (1, 6, 5))

    def test_chat(self):
        # Nothing but what the template renders: neither BOS nor EOS.
        row = {"prompt": USER, "chosen": "yes", "rejected": "no"}
        expected = [
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "yes<|im_end|>\n",
            "no<|im_end|>\n",
        ]
        for tokenizer in (
            make_tokenizer(CHATML, bos=True),
            TokenizerWrapper(make_tokenizer(CHATML)),
        ):
            self.assertEqual(self.texts(row, tokenizer), expected)
            wrapped = self.texts(pair("Hi", "yes", "no"), tokenizer, wrap_text=True)
            self.assertEqual(wrapped, expected)

    def test_thinking_template(self):
        row = {"prompt": USER, "chosen": "yes", "rejected": "no"}
        start = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        tokenizer = make_tokenizer(THINKING)
        dataset = PreferenceDataset([row], tokenizer)
        prompt, chosen, *_ = dataset[0]
        # As generation renders it, though the whole conversation has no thought.
        thought = "<think>\n\n</think>\n\n"
        self.assertEqual(text_of(tokenizer, prompt), start + thought)
        self.assertEqual(text_of(tokenizer, chosen), "yes<|im_end|>\n")
        self.assertTrue(any("otherwise" in line for line in dataset.summary()))
        # The wrapper asks for thinking, as it does for mlx_lm.generate, so the
        # prompt alone is a true prefix; a row's own arguments win.
        wrapper = TokenizerWrapper(tokenizer)
        served = wrapper.apply_chat_template(USER, add_generation_prompt=True)
        dataset = PreferenceDataset([row], wrapper)
        self.assertEqual(dataset[0][0].tolist(), served)
        self.assertFalse(any("otherwise" in line for line in dataset.summary()))
        row["chat_template_kwargs"] = {"enable_thinking": False}
        dataset = PreferenceDataset([row], wrapper)
        self.assertEqual(text_of(tokenizer, dataset[0][0]), start + thought)

    def test_tools_reach_the_template(self):
        template = "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}" + CHATML
        row = {"prompt": USER, "chosen": "yes", "rejected": "no"}
        row["tools"] = json.dumps([{"name": "clock"}])
        prompt, chosen, _ = self.texts(row, make_tokenizer(template))
        self.assertTrue(prompt.startswith("[clock]<|im_start|>user"))
        self.assertEqual(chosen, "yes<|im_end|>\n")

    def test_transcripts(self):
        start = "\n\nHuman: Hi\n\nAssistant:"
        row = {"chosen": start + " yes", "rejected": start + " no"}
        raw = [start, " yes</s>", " no</s>"]
        self.assertEqual(self.texts(row, make_tokenizer()), raw)
        chat = make_tokenizer(CHATML)
        self.assertEqual(self.texts(row, chat, transcripts="raw"), raw)
        self.assertEqual(self.texts(row, chat)[1], "yes<|im_end|>\n")

    def test_own_renderer_and_own_encode(self):
        class OwnRenderer(PreTrainedTokenizerFast):
            def apply_chat_template(self, messages, tokenize=True, **kwargs):
                text = "|".join(m["content"] for m in messages) + "|"
                ids = self.encode(text, add_special_tokens=False)
                return ids if tokenize else text

        row = {"prompt": USER, "chosen": "yes", "rejected": "no"}
        for wrap in (TokenizerWrapper, lambda x: x):
            tokenizer = wrap(make_tokenizer(kind=OwnRenderer))
            self.assertEqual(self.texts(row, tokenizer), ["Hi|", "yes|", "no|"])
        tokenizer = make_tokenizer(kind=NewlineTokenizer)
        ids = PreferenceDataset([pair("a\n")], tokenizer)[0][0].tolist()
        self.assertEqual(ids, tokenizer.encode("a<n>"))

    def test_pair_tokenizer(self):
        encode = PairTokenizer(make_tokenizer())
        self.assertFalse(encode.has_chat_template)
        good, bad = encode(
            [
                PreferenceRow("a", "b", "c", "text"),
                PreferenceRow(USER, USER, USER, "messages"),
            ]
        )
        self.assertIsInstance(good, TokenPair)
        self.assertIn("chat template", bad.reason)

    def test_shared_start_is_encoded_once(self):
        """Ids are those of each text alone, whatever tokens do to neighbours."""
        texts = ["Hi", " two  words ", "<a>", "x<", "é ü", "a\n\n", "im_start|>", "▁"]
        templates = (
            CHATML,
            CHATML.replace("<|im_start|>", " <|im_start|> "),
            "{% for m in messages %}{{ m.content }}<|im_start|>{{ m.role }}"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>go{% endif %}",
        )
        start = "<|im_start|>"
        added = [
            [AddedToken(start, special=True)],
            [AddedToken(start, special=True, lstrip=True)],
            [AddedToken(start, special=True, rstrip=True)],
            [AddedToken(start, special=True, normalized=True)],
            [AddedToken(start, special=True, single_word=True)],
            [AddedToken(start, special=True), AddedToken("\n<|im", special=True)],
            [AddedToken(start, special=True), AddedToken(start + "a", special=True)],
            [AddedToken(start, special=True), AddedToken(" ", normalized=False)],
        ]
        for number, (backend, tokens, template) in enumerate(
            itertools.product(BACKENDS, added, templates)
        ):
            backend = Tokenizer.from_str(backend)
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
            tokenizer.add_tokens([*tokens, AddedToken("<|im_end|>", special=True)])
            tokenizer.chat_template = template
            tokenizer.split_special_tokens = number % 5 == 4
            rng = random.Random(number)
            say = lambda role: {"role": role, "content": rng.choice(texts)}
            rows = [
                PreferenceRow(
                    [say("user")], [say("assistant")], [say("assistant")], "messages"
                )
                for _ in range(20)
            ]
            whole = mock.patch.object(PairTokenizer, "_find_borders", lambda *_: [])
            with self.subTest(number=number):
                split = PairTokenizer(tokenizer)(rows)
                with whole:
                    expected = PairTokenizer(tokenizer)(rows)
                self.assertEqual(list(map(str, split)), list(map(str, expected)))
                slow = PairTokenizer(tokenizer)
                slow._backend = None
                self.assertEqual(list(map(str, slow(rows))), list(map(str, split)))

    def test_length(self):
        with self.assertRaisesRegex(InputError, "max_length must be at least 2, got 1"):
            PreferenceDataset([pair()], make_tokenizer(), 1)


class TestColumns(unittest.TestCase):
    def test_what_was_read_as_what(self):
        start = "Q: is it so?"
        told = pair(start, f"{start} yes", f"{start} no")
        others = {f"note_{i}": "a text" for i in range(14)}
        rows = [[told, {**told, **others}], [told], [{"question": "Q", **PLAIN}]]
        parts = [PreferenceDataset(part, make_tokenizer()) for part in rows]
        both = PreferenceDataset.concatenate(parts)
        lines = "\n".join(both.summary())
        self.assertIn("In 3 rows both answers repeated the prompt, which", lines)
        self.assertIn("'note_11' and 2 more.", lines)
        columns = (
            "prompt: prompt, question · answers: chosen, rejected · not read: note_0"
        )
        self.assertTrue(both.notes.read_as().startswith(columns))
        # What was done is said once, of the whole.
        self.assertEqual(both.select([0]).notes.remarks, {})
        shared = PreferenceDataset(
            [{"chosen": "so a", "rejected": "so b"}], make_tokenizer()
        )
        self.assertIn("prompt: the start of the answers", shared.notes.read_as())


if __name__ == "__main__":
    unittest.main()
