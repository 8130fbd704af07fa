# Copyright © 2026 MLX Contributors

import contextlib
import gzip
import io
import json
import os
import sys
import unittest
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
from folders import FolderCase
from tiny import ROWS, float64_logps, save_tiny_model

from mlx_lm.tuner.datasets import PreferenceDataset
from mlx_lm.utils import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import mac_report  # noqa: E402
import run_benchmark  # noqa: E402
from run_benchmark import Run  # noqa: E402

TORCH_PYTHON = os.environ.get("TORCH_PYTHON", sys.executable)
LENGTHS = "--shape tiny --lengths 24+8 12+4+6 --dtype float32".split()


def arguments(*words):
    return run_benchmark.build_parser().parse_args([str(w) for w in words])


def step(pairs, seconds, peak=1.0, count=4):
    speed = {"pairs_per_second": count / seconds, "peak_memory": peak}
    return {"trained_pairs": pairs, **speed}


class TestRunBenchmark(FolderCase):
    def run_it(self, *words):
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            results = run_benchmark.main([str(w) for w in words])
        return results, screen.getvalue()

    def test_a_run_and_a_second_one(self):
        output = self.folder / "out"
        more = ["--frameworks", "mlx", "--pairs", 12, "--output", output]
        results, screen = self.run_it(*LENGTHS, *more, "--", "--beta", "0.2")
        rows = [x.split(" | ") for x in screen.splitlines() if x.startswith("| mlx")]
        names = ["| mlx_lm.dpo, first epoch", "| mlx_lm.dpo, reference known"]
        self.assertEqual([row[0] for row in rows], names)
        for row, (run,) in zip(rows, results[4].values(), strict=True):
            self.assertEqual(float(row[2]), float(f"{run.whole:.4g}"))
            for value in (run.start_up, run.whole, run.half, run.peak):
                self.assertGreater(value, 0)
            self.assertAlmostEqual(run.predicted, run.peak, delta=run.peak)
            self.assertIn("padding", run.plan)
        first, known = (
            output / "batch4" / "mlx0" / name for name in ("first", "known")
        )
        header = run_benchmark.read_header((known / "log.txt").read_text())
        self.assertEqual(header["loss"], "sigmoid · beta 0.2")
        losses = [
            [
                x["train_loss"]
                for x in run_benchmark.read_metrics(file)
                if "grad_norm" in x
            ]
            for file in (
                first / "adapters/metrics.jsonl",
                known / "adapters/metrics.jsonl",
            )
        ]
        # 12 pairs, one of them held out; the same steps with the reference known.
        self.assertEqual(len(losses[0]), 3)
        np.testing.assert_allclose(*losses, atol=1e-5)

    def test_numbers_of_a_clock(self):
        lines = [
            (5.0, {"val_time": 1.0}),
            # It began at 8; a validation took 3 of the 9 seconds after 13.
            (10.0, step(4, 2.0, peak=3.0)),
            (13.0, step(8, 3.0)),
            (16.0, {"val_time": 3.0}),
            (17.0, step(12, 1.0)),
            (22.0, step(14, 5.0)),
            (30.0, {"val_time": 8.0}),
        ]
        run = run_benchmark.summarize(lines)
        self.assertEqual(run.start_up, 10)
        self.assertAlmostEqual(run.whole, 14 / 11)
        self.assertAlmostEqual(run.half, 6 / 6)
        self.assertEqual(run.peak, 3)
        with self.assertRaisesRegex(ValueError, "1 steps are too few"):
            run_benchmark.summarize(lines[:2])

    def test_medians_spreads_and_ratios(self):
        ours = [Run(9, whole, half, None) for whole, half in ((4, 8), (6, 8), (5, 9))]
        theirs = [Run(3, whole, 2, None) for whole in (1, 2, 2)]
        runs = {("mlx", "known"): ours, ("torch", "known"): theirs}
        text = "\n".join(run_benchmark.table("title", runs))
        self.assertIn(
            "| mlx_lm.dpo, reference known | 9 | 5 (4 - 6) | 8 (8 - 9) | -", text
        )
        self.assertIn(
            "known, whole epoch: 3.00; reference known, second half: 4.00.", text
        )
        self.assertNotIn("first epoch", text)
        self.assertNotIn("built", text)
        ours[1].built = 105
        text = "\n".join(run_benchmark.table("title", runs))
        self.assertIn("reference known (built 105 kernels) |", text)

    def test_kernels_that_a_run_built(self):
        screen = "Built 1,105 GPU kernels within the first 38 s: later runs find them."
        args = arguments(*LENGTHS)

        def watch(words, metrics, log):
            log.write_text(screen)
            return [(1.0, step(4, 1.0)), (2.0, step(8, 1.0))]

        job = run_benchmark.Job(self.folder, self.folder, self.folder, 8, 80)
        with mock.patch.object(run_benchmark, "watch", watch):
            run = run_benchmark.run_command(args, job, 4, self.folder)
            self.assertEqual(run.built, 1105)
            screen = ""
            run = run_benchmark.run_command(args, job, 4, self.folder)
        self.assertEqual(run.built, 0)

    def test_lengths_are_what_was_asked_for(self):
        args = arguments(*LENGTHS, "--pairs", 9)
        with contextlib.redirect_stdout(io.StringIO()):
            job = run_benchmark.prepare(args, self.folder)
        rows = [
            json.loads(x)
            for x in (job.data / "train.jsonl").read_text().split("\n")[:-1]
        ]
        dataset = PreferenceDataset(rows, run_benchmark.load_tokenizer(job.model))
        expected = [[24, 32, 32], [12, 16, 18]] * 5
        self.assertEqual(dataset.pair_lengths().tolist(), expected[:9])
        for word in ("12", "12+", "a+3", "0+3", "4+1", "1+2+3+4", "-1+4"):
            with self.subTest(word), self.assertRaises(ValueError):
                run_benchmark.parse_lengths([word])

    def test_a_file_of_pairs(self):
        tokenizer = save_tiny_model(self.folder / "tiny")
        longest = {**ROWS[0], "prompt": [{"role": "user", "content": "x" * 90}]}
        rows = [ROWS[0], longest, *ROWS[1:]]
        data = self.folder / "pairs.jsonl.gz"
        data.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
        words = ["--data", data, "--max-length", 80, "--pairs", len(ROWS) - 1]
        shape = ["--shape", "tiny", "--tokenizer", tokenizer, "--vocabulary", 300]
        with contextlib.redirect_stdout(io.StringIO()) as screen:
            job = run_benchmark.prepare(arguments(*words, *shape), self.folder / "a")
            other = arguments(*words, "--model", tokenizer)
            same = run_benchmark.prepare(other, self.folder / "b")
        self.assertEqual(load(job.model)[0].args.vocab_size, 300)
        self.assertEqual(job.pairs.read_text(), same.pairs.read_text())
        kept = (job.data / "train.jsonl").read_text().split("\n")
        self.assertEqual(kept, [*map(json.dumps, ROWS[:-1]), ""])
        # One pair is held out, as the command does it.
        self.assertEqual((job.count, same.model), (len(ROWS) - 2, tokenizer.resolve()))
        self.assertNotIn("Say", screen.getvalue())
        with self.assertRaisesRegex(ValueError, "needs a --tokenizer"):
            self.run_it(*words, "--shape", "tiny")

    def test_a_run_that_fails(self):
        with self.assertRaisesRegex(ValueError, "code 3: see .*log.txt"):
            words = [sys.executable, "-c", "print('secret'); exit(3)"]
            run_benchmark.watch(words, self.folder / "none", self.folder / "log.txt")
        versions, reason = run_benchmark.pytorch_versions(sys.executable)
        self.assertTrue(versions or "No module named" in reason, reason)

    def test_pytorch_over_the_same_pairs(self):
        versions, reason = run_benchmark.pytorch_versions(TORCH_PYTHON)
        if reason:
            self.skipTest(reason)
        output = self.folder / "out"
        more = ["--frameworks", "torch", "--pairs", 12, "--output", output]
        results, screen = self.run_it(*LENGTHS, *more, "--torch-python", TORCH_PYTHON)
        self.assertIn(versions, screen)
        for (run,) in results[4].values():
            self.assertGreater(run.whole, 0)
        pairs = json.loads((output / "pairs.json").read_text())
        model, _ = load(output / "model")
        expected = []
        for prompt, *answers in pairs:
            for answer in answers:
                ids, count = [*prompt, *answer], len(answer)
                logits = model(mx.array([ids[:-1]]))[:, -count:]
                targets = np.array([answer])
                expected.append(float64_logps(logits, targets, np.ones((1, count)))[0])
        known = np.load(output / "batch4" / "torch0" / "references.npy")
        np.testing.assert_allclose(known.reshape(-1), expected, atol=1e-3)


class TestMacReport(unittest.TestCase):
    def report(self, *words):
        screen, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(errors):
            done = mac_report.main(["--probe", "tiny", "--seeds", "2", *words])
        return done, screen.getvalue()

    def test_the_whole_report(self):
        mx.disable_compile()
        self.addCleanup(mx.enable_compile)
        words = ["--batch-size", "2", "--pairs", "6", "--rounds", "1"]
        done, screen = self.report(*LENGTHS[:5], *words)
        self.assertTrue(done, screen)
        self.assertIn(f"mlx {mx.__version__}", screen)
        rows = [x for x in screen.splitlines() if x.startswith("| ") and " | ok |" in x]
        self.assertEqual(len(rows), 6)
        self.assertNotIn("**", screen)
        for name in mac_report.PRECISIONS:
            # What every precision must find, tests of the check itself say.
            self.assertRegex(screen, rf"\| {name} \| \w+ \| \w+ \| [\d.]+ \|")
        for row in ("mlx_lm.dpo, reference known", "(4) ours, reference known"):
            self.assertIn(f"| {row} | ", screen)

    def test_a_section_that_fails(self):
        with (
            mock.patch.object(run_benchmark, "main", side_effect=OSError("no disk")),
            mock.patch.object(mac_report.dpo_benchmark, "run"),
            mock.patch.object(mac_report, "check_sharing", side_effect=MemoryError),
        ):
            done, screen = self.report(*LENGTHS[:5])
        self.assertFalse(done)
        self.assertIn("**failed**: OSError: no disk", screen)
        self.assertIn("**failed**: MemoryError", screen)
        self.assertIn("## A step", screen)

    def test_a_wrong_loss_is_found(self):
        def wrong(*logits, beta=0.1, **rest):
            return mac_report_loss(*logits[:4], 1.01 * BETA, **rest)

        mac_report_loss, BETA = mac_report.dpo_loss, mac_report.BETA
        with (
            mock.patch.object(mac_report, "dpo_loss", wrong),
            contextlib.redirect_stdout(io.StringIO()) as screen,
        ):
            mac_report.check_loss(None)
        self.assertEqual(screen.getvalue().count("**off**"), 6)


if __name__ == "__main__":
    unittest.main()
