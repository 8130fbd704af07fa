# Copyright © 2026 MLX Contributors

import itertools
import json
import random
import unittest
from unittest import mock

import numpy as np
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from mlx_lm.preference.data.pairs import PreferenceRow
from mlx_lm.preference.data.sources import LocatedRows
from mlx_lm.preference.data.tokenizer import PairTokenizer, TokenPair
from mlx_lm.preference.errors import InputError
from mlx_lm.tokenizer_utils import NewlineTokenizer, TokenizerWrapper
from mlx_lm.tuner.datasets import PreferenceDataset

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Its generation prompt holds an empty thought that finished answers don't have.
THINKING = CHATML.replace(
    "assistant\n{% endif",
    "assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif",
)
STRICT = "{{ raise_exception('roles must alternate') if messages[0].role != 'user' }}"


def make_backends():
    """Tokenizers whose ids may depend on where a piece of text stands."""
    chars = sorted({*map(chr, range(32, 127)), *"\n▁éü"})
    merges = [("▁", "t"), ("▁t", "w"), ("h", "i"), ("\n", "\n"), ("▁", "▁")]
    vocab = {c: i for i, c in enumerate([*chars, *("".join(m) for m in merges), "?"])}
    for scheme in ("first", "always", "never"):
        bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="?"))
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        yield bpe.to_str()
    bpe.pre_tokenizer = None
    bpe.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    yield bpe.to_str()
    unigram = Tokenizer(
        models.Unigram([(t, -len(vocab) + i) for t, i in vocab.items()], 0)
    )
    unigram.normalizer = normalizers.Lowercase()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    yield unigram.to_str()
    yield make_tokenizer().backend_tokenizer.to_str()


USER = [{"role": "user", "content": "Hi"}]


def make_tokenizer(template=None, bos=False, kind=PreTrainedTokenizerFast):
    """A tokenizer with one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = kind(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[2:],
    )
    tokenizer.chat_template = template
    return tokenizer


def text_of(tokenizer, ids):
    return tokenizer.decode(list(map(int, ids)))


BACKENDS = list(make_backends())


PLAIN = {"chosen": " yes", "rejected": " no"}


def pair(prompt="Q:", chosen=" yes", rejected=" no"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


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
        with self.assertRaisesRegex(ValueError, "Known columns: prompt, chosen, rej"):
            PreferenceDataset([{"text": "a"}], make_tokenizer(), max_bad_rows=1)
        with self.assertRaisesRegex(ValueError, "has no rows"):
            PreferenceDataset([], make_tokenizer())
        with self.assertRaisesRegex(ValueError, "need a chat template"):
            row = {"prompt": USER, "chosen": "a", "rejected": "b"}
            PreferenceDataset([row], make_tokenizer())

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
