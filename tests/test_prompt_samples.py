# Copyright © 2026 MLX Contributors

import contextlib
import io
import json
import unittest
from unittest import mock

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from folders import FolderCase
from rich.cells import cell_len
from tiny import random_pairs, save_tiny_model, train, weights_of

from mlx_lm import generate, load
from mlx_lm.preference.run.reading import read_lines
from mlx_lm.preference.watch.samples import (
    PromptSamples,
    prompt_text,
    read_prompts,
    sample_line,
)
from mlx_lm.tuner.utils import linear_to_lora_layers

ASKED = "What is the sun?"
MESSAGES = [{"role": "user", "content": ASKED}]


def quiet():
    return contextlib.redirect_stdout(io.StringIO())


class TestPrompts(FolderCase):
    def test_lists_and_files(self):
        rows = ["Hi", {"prompt": "Hello"}, {"messages": MESSAGES}, MESSAGES]
        wanted = ["Hi", "Hello", MESSAGES, MESSAGES]
        self.assertEqual(read_prompts(rows), wanted)
        file = self.folder / "prompts.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.assertEqual(read_prompts(str(file)), wanted)
        file.write_text('"One\u2028line"\n', "utf-8")
        self.assertEqual(read_prompts(str(file)), ["One\u2028line"])
        file = self.folder / "prompts.txt"
        file.write_text("One\n\nTwo\n")
        self.assertEqual(read_prompts(str(file)), ["One", "Two"])
        self.assertEqual(prompt_text(MESSAGES), ASKED)

    def test_unusable(self):
        (self.folder / "bad.jsonl").write_text('{"prompt":\n')
        (self.folder / "none.txt").write_text("\n")
        for given, message in (
            (7, "must be a list or a file"),
            ([], "has no prompts"),
            ([" ", ""], "prompt 2 is no prompt"),
            ([{"text": "Hi"}], "prompt 1 is no prompt"),
            ([[{"role": "user"}]], "prompt 1 is no prompt"),
            ("nowhere.txt", "can't be read: No such file"),
            (str(self.folder / "bad.jsonl"), "can't be read"),
            (str(self.folder / "none.txt"), "has no prompts"),
        ):
            with self.subTest(given=given):
                with self.assertRaisesRegex(ValueError, message) as caught:
                    read_prompts(given)
                self.assertNotIn("\n", str(caught.exception))

    def test_a_line_fits_the_screen(self):
        for prompt, answer in (
            ("Hi", "Hello"),
            ("why? " * 40, "because\n\n " * 40),
            ("日本語" * 20, "漢字" * 80),
            ("x", "\x1b[31mred\x07"),
        ):
            line = sample_line(100, prompt, answer)
            self.assertLessEqual(cell_len(line), 80)
            self.assertTrue(line.isprintable())
        self.assertIn("Hi → Hello", sample_line(1, "Hi", "Hello"))


class TestSamples(FolderCase):
    def setUp(self):
        super().setUp()
        self.model_folder = save_tiny_model(self.folder / "model")
        self.file = self.folder / "samples.jsonl"

    def load(self, dropout=0.3):
        model, tokenizer = load(str(self.model_folder))
        model.freeze()
        mx.random.seed(0)
        parameters = {"rank": 4, "dropout": dropout, "scale": 10.0}
        linear_to_lora_layers(model, 2, parameters)
        return model, tokenizer

    def samples(self, model, tokenizer, prompts=(ASKED,), **options):
        return PromptSamples(
            model, tokenizer, list(prompts), self.file, max_tokens=4, **options
        )

    def test_training_is_the_same_to_the_bit(self):
        results = []
        for asked, checkpointed in (
            (False, False),
            (True, False),
            (False, True),
            (True, True),
        ):
            model, tokenizer = self.load()
            callback = self.samples(model, tokenizer) if asked else None
            train(
                model,
                random_pairs(8),
                random_pairs(3),
                optim.Adam(1e-2),
                callback,
                iters=6,
                steps_per_eval=2,
                grad_checkpoint=checkpointed,
            )
            results.append(weights_of(model))
        for plain, sampled in (results[:2], results[2:]):
            for name, x in plain.items():
                np.testing.assert_array_equal(x, sampled[name])
        self.assertEqual([x["iteration"] for x in read_lines(self.file)], [0, 2, 4, 6])

    def test_the_model_and_random_numbers_are_left_alone(self):
        model, tokenizer = self.load()
        model.train()
        model.layers[0].eval()
        modes = [module.training for module in model.modules()]
        before = [np.array(x) for x in mx.random.state]
        samples = self.samples(model, tokenizer, [ASKED, MESSAGES])
        first, second = samples.answers()
        self.assertTrue(first.strip())
        self.assertEqual(first, second)
        self.assertEqual([module.training for module in model.modules()], modes)
        for x, y in zip(before, mx.random.state):
            np.testing.assert_array_equal(x, np.array(y))
        ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
        model.eval()
        self.assertEqual(first, generate(model, tokenizer, ids, max_tokens=4))

    def test_a_resumed_run_has_no_line_twice(self):
        model, tokenizer = self.load()
        samples = self.samples(model, tokenizer, ["a", "b"])
        with quiet():
            for it in (0, 5, 10):
                samples.on_val_loss_report({"iteration": it})
        with open(self.file, "a") as fid:
            fid.write('{"iteration": 15, "pro')
        samples = self.samples(model, tokenizer, ["a", "b"], keep=5)
        with quiet():
            for it in (10, 15):
                samples.on_val_loss_report({"iteration": it})
        got = [(x["iteration"], x["prompt"]) for x in read_lines(self.file)]
        self.assertEqual(got, [(it, p) for it in (0, 5, 10, 15) for p in "ab"])
        self.samples(model, tokenizer)
        self.assertEqual(read_lines(self.file), [])

    def test_the_reference_is_asked_once(self):
        model, tokenizer = self.load()
        other, _ = load(str(save_tiny_model(self.folder / "other", rope_theta=7.0)))
        prompts = ["a", MESSAGES]
        alone = self.samples(other, tokenizer, prompts).answers()
        own = self.samples(model, tokenizer, prompts).answers()
        self.assertNotEqual(alone, own)
        for reference, beside, said in ((other, alone, 2), (model, own, 0)):
            screen = io.StringIO()
            with contextlib.redirect_stdout(screen):
                samples = self.samples(model, tokenizer, prompts, reference=reference)
                with mock.patch.object(samples, "answers", return_value=own) as asked:
                    for it in (0, 5):
                        samples.on_val_loss_report({"iteration": it})
            self.assertEqual(screen.getvalue().count("  ref  says  "), said)
            # Where the policy starts as its reference, it has answered already.
            self.assertEqual(asked.call_count, 2 if said else 1)
            lines = read_lines(self.file)
            self.assertEqual([x["reference"] for x in lines], beside * 2)
            self.assertEqual([x["answer"] for x in lines], own * 2)
            # Resumed, also before the first step, it is asked about what is new.
            for keep in (5, -1):
                more = {"reference": reference, "keep": keep}
                with mock.patch.object(PromptSamples, "_answers") as asked, quiet():
                    asked.return_value = ["of the new"]
                    self.samples(model, tokenizer, ["new", *prompts], **more)
                (_, new), _ = asked.call_args
                self.assertEqual([x for x, _ in new], ["new"])

    def test_a_reference_that_fails_is_left_out(self):
        model, tokenizer = self.load()
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen):
            samples = self.samples(model, tokenizer, reference=lambda x: 1 / 0)
            samples.on_val_loss_report({"iteration": 0})
        self.assertIn(
            "[WARNING] The reference's answers are left out", screen.getvalue()
        )
        (line,) = read_lines(self.file)
        self.assertNotIn("reference", line)

    def test_without_a_chat_template(self):
        model, tokenizer = self.load()
        tokenizer.has_chat_template = False
        self.assertEqual(len(self.samples(model, tokenizer, ["Say"]).answers()), 1)
        with self.assertRaisesRegex(ValueError, "need a chat template"):
            self.samples(model, tokenizer, [MESSAGES])


if __name__ == "__main__":
    unittest.main()
