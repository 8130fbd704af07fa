# Copyright © 2026 MLX Contributors

import contextlib
import io
import math
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mlx.core as mx
from tiny import save_rows, save_tiny_model

from mlx_lm.models import llama

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import dpo_baselines  # noqa: E402
import dpo_benchmark  # noqa: E402
import dpo_report  # noqa: E402
from dpo_report import Way  # noqa: E402


def run(*arguments):
    """Run the benchmark; return its ways, the rows of its table and all it printed."""
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        (ways,) = dpo_benchmark.run([str(a) for a in arguments])
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in screen.getvalue().splitlines()
        if line.startswith("| (")
    ]
    return ways, rows, screen.getvalue()


class TestDPOBenchmark(unittest.TestCase):
    def setUp(self):
        # A CPU without these kernels in its cache would compile C++ for a minute.
        mx.disable_compile()
        self.addCleanup(mx.enable_compile)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.model = save_tiny_model(self.folder / "model")

    def check(self, ways, rows):
        self.assertEqual([row[0][:3] for row in rows], ["(1)", "(2)", "(3)", "(4)"])
        for row in rows:
            low, high = row.pop(2).split(" - ")
            for cell in (low, high, *row[1:]):
                self.assertTrue(math.isfinite(float(cell)), row)
            self.assertGreater(float(row[1]), 0)

    def test_synthetic_lengths(self):
        options = "--prompt 12 --completion 4 --batch-size 2 --rounds 2".split()
        ways, rows, screen = run("--model", self.model, *options)
        self.check(ways, rows)
        for key in "234":
            # Every step trains on the same pairs; a reference that followed the
            # policy would leave the loss at log 2.
            self.assertLess(ways[key].loss, math.log(2) - 0.001)
        self.assertEqual([len(way.seconds) for way in ways.values()], [2] * 4)
        self.assertIn("token floor (P + 2C) / (2P + 2C) = 0.625.", screen)
        for ratio in ("time (4)/(1)", "time (3)/(1)", "time (2)/(4)", "memory (4)/(1)"):
            self.assertIn(ratio, screen)

    def test_data_and_settings(self):
        data = save_rows(self.folder / "data") / "train.jsonl"
        call = llama.TransformerBlock.__call__
        options = "--batch-size 2 --batches 2 --rounds 1 --grad-checkpoint".split()
        options += "--bits 4 --group-size 32 --fine-tune-type dora".split()
        with (
            mock.patch.object(dpo_baselines, "LEARNING_RATE", 0.0),
            mock.patch.object(dpo_benchmark, "LEARNING_RATE", 0.0),
        ):
            ways, rows, screen = run("--model", self.model, "--data", data, *options)
        self.check(ways, rows)
        for key in "234":
            self.assertAlmostEqual(ways[key].loss, math.log(2), delta=1e-4)
        self.assertIs(llama.TransformerBlock.__call__, call)
        self.assertIn("\n4 pairs, ", screen)
        self.assertNotIn("cat", screen.replace(str(self.folder), ""))

    def test_what_is_missing_or_wrong(self):
        with self.assertRaisesRegex(ValueError, "Give either --model or --shape"):
            dpo_benchmark.run([])
        with self.assertRaisesRegex(ValueError, "equally many"):
            lists = {"prompt": [1, 2], "completion": [1, 2, 3], "batch_size": [1]}
            dpo_report.sizes(SimpleNamespace(**lists))


class TestDPOReport(unittest.TestCase):
    def test_ratios_are_of_rounds(self):
        slow, fast = Way("a", seconds=[2, 8, 3]), Way("b", seconds=[1, 2, 3])
        self.assertEqual(dpo_report.median_ratio(slow, fast), 2)
        self.assertIsNone(dpo_report.median_ratio(slow, Way("c")))

    def test_a_way_that_failed_has_a_row_and_no_ratio(self):
        ways = {"1": Way("(1)", failure="failed: no memory"), "4": Way("(4)", 8, 1)}
        ways["4"].seconds, ways["4"].peak = [1.0, 2.0, 3.0], 5e9
        text = "\n".join(dpo_report.table("title", ways, [(2, 4, 4)]))
        self.assertIn("| (1) | failed: no memory |", text)
        self.assertIn("| (4) | 2 | 1.5 - 2.5 | 5.000 | - | - | 1.00 | 1.0 |", text)
        self.assertNotIn("time (4)/(1)", text)

    def test_floor_of_uneven_lengths(self):
        # 10 + 2 and 10 + 4 tokens, 16 with the prompt once; 4 + 4 and 4 + 4, 12.
        floor = dpo_report.token_floor([(10, 12, 14), (4, 8, 8)])
        self.assertAlmostEqual(floor, 28 / 42)

    def test_single_values_serve_every_size(self):
        args = SimpleNamespace(prompt=[768, 256], completion=[128], batch_size=[8])
        self.assertEqual(dpo_report.sizes(args), [(768, 128, 8), (256, 128, 8)])


if __name__ == "__main__":
    unittest.main()
