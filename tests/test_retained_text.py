# Copyright © 2026 MLX Contributors

import contextlib
import hashlib
import io
import json
import math
import runpy
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.optimizers as optim
import model_zoo as zoo
import numpy as np
from folders import FolderCase
from tiny import save_tiny_model, tiny_model

from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.preference.batch.collate import collate_pairs
from mlx_lm.preference.forward import head
from mlx_lm.preference.forward.probe import check_sharing
from mlx_lm.preference.watch import retained_text
from mlx_lm.preference.watch.retained_text import (
    RetainedText,
    encode_text,
    read_text,
    scored_text,
    text_perplexity,
)
from mlx_lm.tuner.trainer import dpo_step
from mlx_lm.utils import load

TEXT = "The cat sat on the mat and looked at the moon. " * 30


class TestPerplexity(unittest.TestCase):
    def test_every_token_but_the_first_is_scored_once(self):
        model = tiny_model()
        tokens = np.random.default_rng(0).integers(1, 64, 23).tolist()
        for window in (4, 11, 22, 100):
            # In float64, with the windows written out.
            total = 0.0
            for start in range(0, 22, window):
                part = tokens[start : start + window + 1]
                x = np.array(model(mx.array([part[:-1]]))[0], np.float64)
                logps = x - np.log(np.exp(x).sum(-1, keepdims=True))
                total += sum(logps[i, t] for i, t in enumerate(part[1:]))
            got, scored = text_perplexity(model, tokens, window)
            self.assertEqual(scored, 22)
            self.assertAlmostEqual(math.log(got), -total / 22, places=5)

    def test_the_function_that_generates(self):
        # The first two are another one without their caches.
        for name in ("gemma3n", "phi3small", "llama4", "qwen3_next"):
            model = zoo.build(name)
            model.eval()
            tokens = np.random.default_rng(1).integers(1, 60, 17).tolist()
            logits = model(mx.array([tokens[:-1]]), cache=make_prompt_cache(model))
            x = np.array(logits[0].astype(mx.float32), np.float64)
            logps = x - np.log(np.exp(x).sum(-1, keepdims=True))
            total = logps[np.arange(16), tokens[1:]].sum()
            check_sharing(model)
            with self.subTest(name=name):
                found = math.log(text_perplexity(model, tokens, 16)[0])
                self.assertAlmostEqual(found, -total / 16, delta=1e-4)

    def test_the_mode_stays(self):
        model = tiny_model("lora", dropout=0.5)
        for training in (True, False):
            model.train(training)
            first, second = (text_perplexity(model, [1, 2, 3], 8) for _ in "ab")
            self.assertEqual(first, second)
            self.assertEqual(model.training, training)

    def test_a_training_step_needs_more_memory(self):
        model = tiny_model(vocab_size=32768)
        tokens = list(range(256))
        batch = collate_pairs([(tokens[:64], tokens[64:], tokens[64:], (64, 256, 256))])
        optimizer = optim.SGD(1e-5)

        def step():
            mx.eval(dpo_step(model, None, batch | known, optimizer)[0])

        known = {"reference_logps": mx.zeros((2,))}
        peaks = []
        with mock.patch.object(head, "default_chunk_bytes", lambda: 2**20):
            for work in (step, lambda: text_perplexity(model, tokens, 256)):
                mx.eval(model.parameters())
                mx.clear_cache()
                mx.reset_peak_memory()
                before = mx.get_active_memory()
                work()
                peaks.append(mx.get_peak_memory() - before)
        self.assertLess(peaks[1], peaks[0])

    def test_a_broken_model(self):
        broken = lambda tokens: mx.where(mx.arange(8) == 0, 5000.0, 0.0) + mx.zeros(
            (*tokens.shape, 8)
        )
        self.assertEqual(text_perplexity(broken, [1, 2, 3], 8), (math.inf, 2))

    def test_too_few_tokens(self):
        with self.assertRaisesRegex(ValueError, "at least 2 tokens"):
            text_perplexity(tiny_model(), [1], 8)

    def test_the_book_is_the_one_that_is_meant(self):
        path = Path(__file__).resolve().parents[1] / "benchmarks" / "retained_text.py"
        fetch_text = runpy.run_path(str(path))["fetch_text"]
        content = b"a book"
        known = {"SHA256": hashlib.sha256(content).hexdigest()}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "texts" / "alice29.txt"
            known["_download"] = lambda: content
            with mock.patch.dict(fetch_text.__globals__, known):
                self.assertEqual(fetch_text(file.parent), file)
                file.write_bytes(b"another book")
                with self.assertRaisesRegex(SystemExit, "not the text that is meant"):
                    fetch_text(file.parent)


class TestText(FolderCase):
    def setUp(self):
        super().setUp()
        self.file = self.folder / "text.txt"

    def test_unusable_files(self):
        for content, message in (
            (None, "No such file"),
            (b"", "has 0 characters, too few"),
            (b"short\n", "has 5 characters, too few"),
            (b"\xff\xfd" * 1000, "it is not UTF-8 text"),
        ):
            if content is not None:
                self.file.write_bytes(content)
            with self.assertRaisesRegex(ValueError, message) as caught:
                read_text(self.file)
            self.assertNotIn("\n", str(caught.exception))
        with self.assertRaisesRegex(ValueError, "can't be read"):
            read_text(self.folder)

    def test_before_and_after(self):
        model, tokenizer = load(str(save_tiny_model(self.folder / "model")))
        self.file.write_text(TEXT)
        settings = (str(self.file), str(self.folder / "model"), 64, str(self.folder))
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen):
            with scored_text(model, tokenizer, *settings):
                head = model.model.embed_tokens
                head.weight = head.weight * 3
        line = screen.getvalue().splitlines()[-1]
        self.assertRegex(
            line,
            r"^Perplexity of text.txt: [\d.]+ before, [\d.]+ after "
            r"\([+-][\d.]+ %\), [\d,]+ tokens$",
        )
        saved = json.loads((self.folder / retained_text.FILE_NAME).read_text())
        tokens = encode_text(tokenizer, TEXT)
        self.assertEqual(tokens, tokenizer.encode(TEXT))
        self.assertEqual(saved["tokens"], len(tokens) - 1)
        self.assertEqual(saved["after"], text_perplexity(model, tokens, 64)[0])
        self.assertAlmostEqual(saved["change"], saved["after"] / saved["before"] - 1)
        self.assertNotEqual(saved["change"], 0)
        with contextlib.redirect_stdout(io.StringIO()):
            with scored_text(model, tokenizer, *settings, start=False):
                pass
        saved = json.loads((self.folder / retained_text.FILE_NAME).read_text())
        self.assertIsNone(saved["before"])
        self.assertIsNone(saved["change"])

    def test_sign(self):
        worse = RetainedText("a/b.txt", 10, after=11.0, before=10.0)
        self.assertIn("(+10.0 %)", worse.line())
        self.assertAlmostEqual(worse.change, 0.1)
        self.assertIn("(-10.0 %)", RetainedText("b", 1, 9.0, 10.0).line())
        worse.save(self.folder)
        saved = json.loads((self.folder / retained_text.FILE_NAME).read_text())
        expected = {"file": "a/b.txt", "tokens": 10, "after": 11.0, "before": 10.0}
        self.assertEqual(saved, expected | {"change": worse.change})


if __name__ == "__main__":
    unittest.main()
