# Copyright © 2026 MLX Contributors

import contextlib
import gzip
import io
import json
import math
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mlx.core as mx
from tiny import ROWS, save_rows, save_tiny_model

from mlx_lm.models import llama
from mlx_lm.tuner.trainer import evaluate_dpo

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import collect_benchmark  # noqa: E402
import dpo_baselines  # noqa: E402
import dpo_benchmark  # noqa: E402
import dpo_report  # noqa: E402
import kl_benchmark  # noqa: E402
import memory_table  # noqa: E402
import memory_validation  # noqa: E402
import objectives_benchmark  # noqa: E402
import quality_benchmark  # noqa: E402
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


class TestQualityBenchmark(unittest.TestCase):
    def test_seeds_of_a_split_file(self):
        mx.disable_compile()
        self.addCleanup(mx.enable_compile)
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            rows = [json.dumps(row) for row in ROWS]
            with gzip.open(folder / "pairs.jsonl.gz", "wt") as file:
                file.write("\n".join(rows))
            arguments = {
                "model": save_tiny_model(folder / "tiny"),
                "data": folder / "pairs.jsonl.gz",
                "output": folder / "out",
                **{"train": len(rows) - 4, "test": 3, "valid": 1, "batch-size": 4},
                **{"accumulate": 2, "max-seq-length": 64, "rank": 2},
                "learning-rate": 1e-3,
            }
            words = [str(x) for k, v in arguments.items() for x in (f"--{k}", v)]
            screen = io.StringIO()
            with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
                results = quality_benchmark.main([*words, "--seeds", "3", "4"])
            self.assertEqual({r["pairs"] for r in results.values()}, {3})
            last = (folder / "out/data/test.jsonl").read_text().splitlines()
            self.assertEqual(last, rows[-3:])
            self.assertRegex(screen.getvalue(), r"\| mean \| [\d.]+% \(")
            # What is there is not trained again.
            with mock.patch.object(quality_benchmark.dpo, "run", side_effect=OSError):
                with contextlib.redirect_stdout(screen):
                    again = quality_benchmark.main([*words, "--seeds", "4"])
            self.assertEqual(again, {4: results[4]})
            with self.assertRaisesRegex(ValueError, "fewer than 999"):
                quality_benchmark.main([*words, "--train", "999"])
            with contextlib.redirect_stderr(screen), self.assertRaises(SystemExit):
                quality_benchmark.main([*words, "--accumulate", "3"])
            self.assertIn("3 does not divide", screen.getvalue())
            self.check_kl(folder / "out", results[3])

    def test_lines_of_a_split_file(self):
        with tempfile.TemporaryDirectory() as folder:
            file, data = Path(folder) / "pairs.jsonl", Path(folder) / "data"
            file.write_text('"a\u2028b"\n\n"c"\n"d"\n', "utf-8")
            rows = quality_benchmark.read_lines(file)
            self.assertEqual([json.loads(x) for x in rows], ["a\u2028b", "c", "d"])
            quality_benchmark.split(file, data, 1, 1, 1)
            quality_benchmark.split(file, data, 2, 0, 1)
            self.assertFalse((data / "valid.jsonl").exists())

    def check_kl(self, folder, result):
        words = f"--adapter-path {folder}/seed3 --data {folder}/data --prompts 2"
        with contextlib.redirect_stdout(io.StringIO()) as screen:
            kl_benchmark.main([*words.split(), "--strengths", "1", "2", "0"])
        lines = [x for x in screen.getvalue().splitlines() if x.startswith("| seed3")]
        whole, twice, start = ([c.strip() for c in x.split("|")] for x in lines[:3])
        self.assertEqual(whole[2:4], ["1", f"{result['rewards/accuracies']:.1%}"])
        self.assertEqual(whole[5], f"{result['kl_per_answer/chosen']:.2f}")
        self.assertEqual([*start[5:7], start[8]], ["0.00", "0.0000", "0.00"])
        self.assertIn(int(whole[9]), range(1, kl_benchmark.MOST_TOKENS + 1))
        # Near the start the KL grows with the square of the way.
        self.assertGreater(float(whole[6]), 0.0005)
        self.assertAlmostEqual(float(twice[6]) / float(whole[6]), 4, delta=0.8)


class TestObjectivesBenchmark(unittest.TestCase):
    def setUp(self):
        mx.disable_compile()
        self.addCleanup(mx.enable_compile)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.readme = self.folder / "README.md"
        self.readme.write_text("# Title\n\n## Other\n\ntext\n")

    def run_some(self, *names):
        options = {
            "model": save_tiny_model(self.folder / "tiny", max_position_embeddings=256),
            "data": save_rows(self.folder / "data"),
            "results": self.folder / "results.json",
            "reference-cache": self.folder / "references",
            "readme": self.readme,
            "iters": 2,
            "learning-rate": 0.01,
            "num-layers": 1,
            "prompts": 2,
            "max-tokens": 3,
        }
        arguments = [str(x) for k, v in options.items() for x in (f"--{k}", v)]
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            return objectives_benchmark.main([*arguments, "--only", *names])

    def test_runs_are_kept_and_written_into_the_readme(self):
        runs = self.run_some("start", "sigmoid")["runs"]
        with mock.patch.object(objectives_benchmark, "Bench", side_effect=OSError):
            self.assertEqual(self.run_some("sigmoid")["runs"], runs)
        names = ["kto", "plackett_luce", "sigmoid, ld_alpha 0.5 (LD-DPO)"]
        runs = self.run_some(*names)["runs"]
        start, sigmoid, ranking = (runs[x] for x in ("start", "sigmoid", names[1]))
        self.assertAlmostEqual(start["kl"], 0, places=6)
        self.assertAlmostEqual(start["margin"], 0, places=5)
        # Every run starts anew, and a ranking of two is a pair.
        for key in ("kl", "margin", "chosen", "accuracy"):
            self.assertAlmostEqual(ranking[key], sigmoid[key], places=4)
        for name in {"sigmoid", *names}:
            self.assertGreater(runs[name]["kl"], 0)
            self.assertEqual(len(runs[name]["lengths"]), 2)
        text = self.readme.read_text()
        self.assertTrue(
            text.startswith("# Title\n\n## Other\n\ntext\n\n## Objectives\n")
        )
        self.assertEqual(text.count("## Objectives"), 1)
        rows = [x.split("|")[1].strip() for x in text.splitlines() if x[:1] == "|"]
        self.assertEqual(rows[2:5], ["start", "`sigmoid`", "`kto`"])

    def test_scores_are_those_of_a_whole_forward(self):
        measured = {}
        scores = objectives_benchmark.score_pairs

        def score(model, start, dataset, settings):
            # The start as a function of tokens shares nothing with the policy.
            whole = lambda tokens: start(tokens)
            measured.update(evaluate_dpo(model, whole, dataset, 3, beta=1.0))
            return scores(model, start, dataset, settings)

        with mock.patch.object(objectives_benchmark, "score_pairs", score):
            run = self.run_some("sigmoid")["runs"]["sigmoid"]
        self.assertAlmostEqual(measured["rewards/margins"], run["margin"], places=4)
        self.assertAlmostEqual(measured["rewards/accuracies"], run["accuracy"])

    def test_a_table_has_one_budget(self):
        self.run_some("start")
        text = (self.folder / "results.json").read_text()
        (self.folder / "results.json").write_text(
            text.replace('"iters": 2', '"iters": 3')
        )
        with self.assertRaisesRegex(ValueError, "holds runs with"):
            self.run_some("start")
        with self.assertRaisesRegex(ValueError, "Unknown run sigmoidal"):
            self.run_some("sigmoidal")


class TestMemory(unittest.TestCase):
    def screen_of(self, main, *words):
        screen = io.StringIO()
        with mock.patch("sys.argv", ["x", *words]), contextlib.redirect_stdout(screen):
            main()
        return screen.getvalue()

    def test_the_largest_models_of_macs(self):
        small = [(8, "tiny", "float32", (1, 64, False))]
        options = {"MODELS": ["tiny"], "SMALL": small, "MACS": {8: 2 / 3}}
        with mock.patch.multiple(memory_table, **options):
            text = self.screen_of(memory_table.main)
        rows = [x.split("|")[2:-1] for x in text.splitlines() if "8 GB (5.7)" in x]
        weights = ["float32", "4-bit", "4-bit", "bfloat16"]
        self.assertEqual([row[2].strip() for row in rows], weights)
        # In rooms of its own this model trains without checkpoints.
        self.assertEqual([row[3].strip() for row in rows][1:], ["4 x 2048"] * 3)

    def test_predicted_beside_measured(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        words = ["--model", str(save_tiny_model(Path(folder.name)))]
        words += "--kinds lora --checkpoint no --lengths 32".split()
        row = self.screen_of(memory_validation.main, *words).splitlines()[-1]
        self.assertRegex(row, r"\| lora \| no \| 1 x 32 \| .* [+-]\d+\.\d% \|")


class TestCollectBenchmark(unittest.TestCase):
    def test_answers_a_minute(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        model = save_tiny_model(Path(folder.name))
        words = "collect --throughput --prompts 2 --max-tokens 3 --batch-sizes 1 4"
        words = [*words.split(), "--long", "8", "--model", str(model)]
        screen = io.StringIO()
        with mock.patch("sys.argv", words), contextlib.redirect_stdout(screen):
            collect_benchmark.main()
        rows = [x.split("|")[1:4] for x in screen.getvalue().splitlines() if "|" in x]
        self.assertEqual(len(rows), 5)
        for _, answers, tokens in rows[2:]:
            # Every answer has as many tokens as it may have.
            self.assertAlmostEqual(float(tokens) * 20, float(answers), delta=1.5)
        self.assertRegex(screen.getvalue(), r"8-token prompt, .* -?\d+% saved")


if __name__ == "__main__":
    unittest.main()
