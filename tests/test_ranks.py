# Copyright © 2026 MLX Contributors

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import mlx.core as mx
from tiny import ROWS, save_rows, save_tiny_model

from mlx_lm.tuner import ranks
from mlx_lm.tuner.ranks import (
    average_over_ranks,
    is_lost_rank,
    start_together,
    sum_over_ranks,
)

LAUNCHER = Path(sys.executable).parent / "mlx.launch"
HAS_RING = LAUNCHER.exists() and mx.distributed.is_available("ring")
TIMES = ("pairs_per_second", "tokens_per_second", "val_time", "compile_seconds")
# What differs although the run does not: time, memory, and filling.
APART = {*TIMES, "peak_memory", "padding"}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@unittest.skipUnless(HAS_RING, "mlx.launch or its ring backend is not there")
class TestRanks(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.root = Path(folder.name)
        cls.model = save_tiny_model(cls.root / "model")
        cls.data = save_rows(cls.root / "data", ROWS + ROWS[:3], ("train",))
        # No multiple of the batch size, and fewer in the last batch than ranks.
        save_rows(cls.data, ROWS[:9], ("valid",))
        cls.one = cls.root / "one"
        cls.run_ranks(1, cls.flags(cls.one))

    @classmethod
    def flags(cls, adapters, *more):
        return [
            *("--model", cls.model, "--data", cls.data, "--adapter-path", adapters),
            *("--train", "--num-layers", 2, "--max-seq-length", 64, "--iters", 9),
            *("--batch-size", 4, "--learning-rate", 1e-3, "--optimizer", "sgd"),
            *("--steps-per-report", 2, "--steps-per-eval", 4, "--save-every", 5),
            *("--val-batches", -1, "--grad-accumulation-steps", 2),
            *("--no-reference-cache", "--no-token-cache"),
            *more,
        ]

    @classmethod
    def start(cls, ranks, flags):
        words = [sys.executable, "-m", "mlx_lm", "dpo", *flags]
        if ranks > 1:
            ring = ["-n", ranks, "--backend", "ring", "--starting-port"]
            words = [sys.executable, LAUNCHER, *ring, free_port(), *words]
        return subprocess.Popen(
            list(map(str, words)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            text=True,
        )

    @classmethod
    def run_ranks(cls, ranks, flags):
        process = cls.start(ranks, flags)
        try:
            return process.communicate(timeout=60)[0]
        finally:
            process.kill()

    def assert_like_one(self, folder):
        lines, expected = (
            list(map(json.loads, (f / "metrics.jsonl").read_text().splitlines()))
            for f in (folder, self.one)
        )
        self.assertEqual(len(lines), len(expected))
        for line, right in zip(lines, expected):
            self.assertEqual(line.keys(), right.keys())
            for key in right.keys() - APART:
                scale = max(1.0, abs(right[key]))
                self.assertLess(abs(line[key] - right[key]) / scale, 1e-5, key)
        weights, expected = (
            mx.load(str(f / "adapters.safetensors")) for f in (folder, self.one)
        )
        self.assertEqual(weights.keys(), expected.keys())
        for key, x in expected.items():
            self.assertLess(mx.abs(weights[key] - x).max().item(), 1e-5, key)

    def test_ranks_equal_one(self):
        for count in (2, 4):
            with self.subTest(ranks=count):
                folder = self.root / f"{count}"
                out = self.run_ranks(count, self.flags(folder))
                self.assert_like_one(folder)
                self.assertEqual(out.count("Saved the adapter"), 1, out)
                self.assertEqual(out.count("Loading datasets"), 1, out)
                self.assertEqual(
                    {p.name for p in folder.iterdir()},
                    {p.name for p in self.one.iterdir()},
                )
                val = [
                    json.loads(line)["val_pairs"]
                    for line in (folder / "metrics.jsonl").read_text().splitlines()
                    if "val_pairs" in line
                ]
                self.assertEqual(set(val), {9.0})

    def test_resume_on_other_counts(self):
        stopped = self.root / "stopped"
        self.run_ranks(2, self.flags(stopped))
        # As if killed after step 5, half of an update.
        (stopped / "0000009_state.safetensors").unlink()
        for count in (1, 4):
            with self.subTest(ranks=count):
                folder = self.root / f"resumed on {count}"
                shutil.copytree(stopped, folder)
                out = self.run_ranks(count, ["--resume", folder])
                self.assertIn("Going on after step 5 of 9", out)
                self.assert_like_one(folder)

    def test_batch_that_ranks_cannot_share(self):
        folder = self.root / "odd"
        out = self.run_ranks(2, self.flags(folder, "--batch-size", 3))
        self.assertEqual(out.count("Error: "), 1, out)
        self.assertIn("batch_size is 3", out)
        self.assertIn("exited with code 2", out)
        self.assertFalse(folder.exists())

    def start_long(self, folder, count=2):
        flags = self.flags(folder, "--iters", 100_000, "--steps-per-eval", 100_000)
        process = self.start(count, flags)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.kill)
        deadline = time.time() + 40
        while not list(folder.glob("*_state.safetensors")):
            self.assertLess(time.time(), deadline, "No checkpoint was written.")
            time.sleep(0.05)
        return process, self.children(process.pid)

    @staticmethod
    def children(pid):
        task = Path(f"/proc/{pid}/task")
        if task.exists():
            found = [p.read_text().split() for p in task.glob("*/children")]
            return sorted(int(x) for line in found for x in line)
        words = ["pgrep", "-P", str(pid)]
        out = subprocess.run(words, capture_output=True, text=True).stdout
        return sorted(map(int, out.split()))

    def test_a_signal_to_one_rank_stops_all(self):
        folder = self.root / "signal"
        process, children = self.start_long(folder)
        os.kill(children[-1], signal.SIGTERM)
        # Busy machines let a ring of processes wait for each other.
        out = process.communicate(timeout=120)[0]
        self.assertEqual(out.count("Go on with: --resume"), 1, out)
        self.assertEqual(out.count("exited with code 143"), 2, out)

    def test_a_lost_rank_ends_the_others(self):
        folder = self.root / "lost"
        process, children = self.start_long(folder)
        os.kill(children[-1], signal.SIGKILL)
        tic = time.time()
        out = process.communicate(timeout=60)[0]
        self.assertLess(time.time() - tic, 30)
        self.assertIn("Rank lost", out)
        self.assertIn(f"--resume {folder}", out)
        self.assertNotIn("Traceback", out)
        saved = max(int(p.name[:7]) for p in folder.glob("*_state.safetensors"))
        out = self.run_ranks(1, ["--resume", folder, "--iters", saved + 2])
        self.assertIn("Going on after step", out)


class TestMessages(unittest.TestCase):
    def test_alone_nothing_is_sent(self):
        tree = {"a": [mx.array([1.0, 2.0])], "b": mx.array(3.0)}
        self.assertIs(average_over_ranks(tree), tree)
        sums = sum_over_ranks({"b": mx.array(3.0)})
        self.assertEqual(sums["b"].item(), 3.0)
        self.assertFalse(start_together())
        self.assertTrue(start_together(failed=True))

    def test_large_trees_take_several_messages(self):
        group = mock.Mock(**{"size.return_value": 2})
        sent = []

        def send(arrays, all_reduce_size):
            sent.append(len(arrays))
            return [x / 2 for x in arrays]

        tree = {"pairs": mx.array(4.0), "g": [mx.ones((3,)), mx.ones((2,))]}
        with (
            mock.patch.object(mx.distributed, "init", lambda: group),
            mock.patch.object(ranks, "MESSAGE_BYTES", 8),
            mock.patch.object(ranks, "average_gradients", send),
        ):
            averaged = average_over_ranks(tree)
        self.assertEqual(sent, [2, 1])
        self.assertEqual(averaged["pairs"].item(), 2.0)
        self.assertEqual(averaged["g"][1].tolist(), [0.5, 0.5])

    def test_only_lost_connections_count(self):
        self.assertTrue(
            is_lost_rank(RuntimeError("[ring] connection to a peer was lost"))
        )
        self.assertFalse(is_lost_rank(RuntimeError("[matmul] wrong shapes")))
        self.assertFalse(is_lost_rank(ValueError("[ring] no")))


if __name__ == "__main__":
    unittest.main()
