# Copyright © 2026 MLX Contributors

"""The sweep reads no test pair, and chooses within its bounds."""

import contextlib
import io
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import quality_sweep  # noqa: E402
from quality_sweep import ACCURACY, KL, TEXT, choose  # noqa: E402


def found(accuracy, kl, text=0.0):
    return {ACCURACY: accuracy, KL: kl, TEXT: text}


class TestQualitySweep(unittest.TestCase):
    def test_the_choice_is_right_most_often_within_the_bounds(self):
        rows = {
            (1e-5, 0.1): found(0.61, 0.2),
            (5e-5, 0.1): found(0.63, 1.7),
            (5e-5, 0.3): found(0.63, 1.5),
            (1e-4, 0.1): found(0.66, 5.8),
            (1e-4, 0.3): found(0.65, 1.9, text=-0.06),
        }
        self.assertEqual(choose(rows, 2.0, 0.05), (5e-5, 0.3))
        self.assertEqual(choose(rows, 2.0, 0.1), (1e-4, 0.3))
        self.assertEqual(choose(rows, 1.0, 0.05), (1e-5, 0.1))
        self.assertIsNone(choose(rows, 0.1, 0.05))

    def run_sweep(self, folder, bound):
        """The sweep with made-up results; what it trained, returned and printed."""
        runs = []

        def run(words):
            given = dict(zip(words[::2], words[1::2]))
            runs.append(given)
            rate, beta = float(given["--learning-rate"]), float(given["--beta"])
            accuracy = 0.6 + 100 * rate
            return {s: found(accuracy + s / 100, 4e4 * rate / beta) for s in (0, 2)}

        screen = io.StringIO()
        data = folder / "pairs.jsonl"
        data.write_text("".join(f'{{"row": {i}}}\n' for i in range(9)), "utf-8")
        words = f"--data {data} --output {folder}/out --train 4 --valid 2 --rank 8 "
        words += f"--learning-rates 1e-5 1e-4 --betas 0.5 1 --most-kl {bound}"
        with mock.patch("quality_benchmark.main", run):
            with contextlib.redirect_stdout(screen):
                chosen = quality_sweep.main(words.split())
        return runs, chosen, screen.getvalue().splitlines()

    def test_every_setting_is_scored_on_pairs_before_the_test(self):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            runs, chosen, lines = self.run_sweep(folder, 5)
            self.assertEqual(chosen, (1e-4, 1.0))
            self.assertEqual(len({run["--output"] for run in runs}), 4)
            for run in runs:
                first = Path(run["--data"]).read_text("utf-8").splitlines()
                self.assertEqual(first, [f'{{"row": {i}}}' for i in range(6)])
                parts = run["--train"], run["--test"], run["--rank"]
                self.assertEqual(parts, ("4", "2", "8"))
            self.assertEqual(lines[-1], "--learning-rate 0.0001 --beta 1")
            # Means of 60 and 62 %, and more for the larger rate.
            self.assertIn("| **0.0001** | **1** | **62.0%** | **4.00** |", lines[-2])
            _, chosen, lines = self.run_sweep(folder, 0.1)
            self.assertIsNone(chosen)
            self.assertEqual(lines[-1], "No setting stays within the bounds.")


if __name__ == "__main__":
    unittest.main()
