# Copyright © 2026 MLX Contributors

import contextlib
import io
import json
import unittest
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

from folders import FolderCase
from tiny import HAS_MATPLOTLIB, Recorder, save_rows, save_tiny_model

from mlx_lm.dpo import resolve_args, run
from mlx_lm.preference.run.folder import CallbackList
from mlx_lm.preference.run.reading import read_lines
from mlx_lm.preference.settings.checks import check_args
from mlx_lm.preference.watch.falling_chosen import FallingChosen
from mlx_lm.preference.watch.retained_text import retained_metrics
from mlx_lm.preference.watch.samples import PromptSamples
from mlx_lm.preference.watch.watchers import WatchedRun, run_watchers
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.utils import load


class TestRun(FolderCase):
    def setUp(self):
        super().setUp()
        self.adapters = self.folder / "adapters"
        (self.folder / "text.txt").write_text("The sun shines on the sea. " * 60)
        (self.folder / "prompts.txt").write_text("Say tea.\nSay sun.\n")

    def command(self, *more):
        flags = {
            "--adapter-path": self.adapters,
            "--sample-prompts": self.folder / "prompts.txt",
            "--sample-tokens": 3,
            "--retain-data": self.folder / "text.txt",
        }
        if "--resume" not in more:
            flags |= {
                "--model": save_tiny_model(self.folder / "model"),
                "--data": save_rows(self.folder / "data"),
                "--num-layers": 2,
                "--max-seq-length": 64,
                "--steps-per-eval": 2,
                "--save-every": 2,
                "--batch-size": 4,
            }
        words = [str(word) for pair in flags.items() for word in pair]
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            run(resolve_args([*words, *map(str, more)]))
        return screen.getvalue()

    def test_a_run_from_start_to_report(self):
        stale = "test_pairs.json", "report.html"
        self.adapters.mkdir()
        for name in stale:
            (self.adapters / name).write_text("of an earlier run")
        more = ["--report"] if HAS_MATPLOTLIB else []
        screen = self.command("--train", "--iters", 3, *more)
        lines = [x for x in screen.splitlines() if "  says  " in x]
        self.assertEqual(len(lines), 6)
        self.assertRegex(screen, r"Perplexity of text.txt: .* before, .* after \(")
        got = [x["iteration"] for x in read_lines(self.adapters / "samples.jsonl")]
        self.assertEqual(got, [0, 0, 2, 2, 3, 3])
        self.assertFalse((self.adapters / "test_pairs.json").exists())
        self.assertEqual((self.adapters / "report.html").exists(), HAS_MATPLOTLIB)
        config = json.loads((self.adapters / "adapter_config.json").read_text())
        self.assertIn("mlx", config["versions"])
        before = retained_metrics(self.adapters)
        # The start of a resumed run is that of the whole one.
        self.command("--resume", self.adapters, "--iters", 5)
        got = [x["iteration"] for x in read_lines(self.adapters / "samples.jsonl")]
        self.assertEqual(got, [0, 0, 2, 2, 3, 3, 4, 4, 5, 5])
        after = retained_metrics(self.adapters)
        key = "retained_text/before"
        self.assertEqual(before[key], after[key])
        # A test alone scores the same two models.
        self.command("--test")
        tested = retained_metrics(self.adapters)
        self.assertEqual(tested[key], after[key])
        self.assertAlmostEqual(
            tested["retained_text/after"], after["retained_text/after"], places=4
        )

    def test_one_that_fails_is_left_out(self):
        """What looks on never ends a run, whatever it does: trackers, samples."""
        seen = []

        class Fails(TrainingCallback):
            def on_train_loss_report(self, info):
                seen.append(info)
                raise KeyError("no network")

        last = Recorder()
        callbacks = CallbackList([Fails(), last], careful=True)
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen):
            for it in (1, 2):
                callbacks.on_train_loss_report({"iteration": it})
                callbacks.on_val_loss_report({"iteration": it})
        self.assertEqual((len(seen), len(last.train), len(last.val)), (1, 2, 2))
        self.assertEqual(
            screen.getvalue(), "[WARNING] Fails is left out: KeyError: 'no network'\n"
        )
        with self.assertRaises(KeyError):
            CallbackList([Fails()]).on_train_loss_report({})
        with mock.patch.object(PromptSamples, "answers", side_effect=ZeroDivisionError):
            out = self.command("--train", "--iters", 2)
        self.assertIn("PromptSamples is left out: ZeroDivisionError", out)

    def test_mistakes_are_found_before_anything_loads(self):
        for flags, message in (
            (["--retain-data", "nowhere.txt"], "retain_data nowhere.txt can't be read"),
            (["--sample-prompts", "nowhere"], "sample_prompts nowhere can't be read"),
            (["--sample-tokens", "0"], "sample_tokens must be at least 1"),
        ):
            args = resolve_args(["--train", "--data", "d", *flags])
            with self.assertRaisesRegex(ValueError, message):
                check_args(args)
        with self.assertRaisesRegex(ValueError, "nowhere has no metrics.jsonl"):
            flags = ["--test", "--data", "d", "--adapter-path", "nowhere", "--report"]
            args = resolve_args(flags)
            with mock.patch("mlx_lm.preference.report.feature.check_matplotlib"):
                check_args(args)

    def test_what_a_run_gets(self):
        model, tokenizer = load(str(save_tiny_model(self.folder / "model")))
        self.adapters.mkdir()
        plain = WatchedRun(self.adapters, model, tokenizer, [1], frozen_start=True)
        (falling,) = run_watchers(plain)
        self.assertIsInstance(falling, FallingChosen)
        self.assertTrue(falling.frozen_start)
        asked = replace(plain, sample_prompts=["Hi"], frozen_start=False)
        state = SimpleNamespace(iteration=4, info={"pending": True})
        falling, samples = run_watchers(asked, state)
        self.assertFalse(falling.frozen_start)
        self.assertIsInstance(samples, PromptSamples)
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen):
            self.assertEqual(len(run_watchers(replace(asked, valid_set=[]), state)), 1)
        self.assertIn("sample_prompts needs validation pairs", screen.getvalue())


if __name__ == "__main__":
    unittest.main()
