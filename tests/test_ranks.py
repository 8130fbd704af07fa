# Copyright © 2026 MLX Contributors

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mlx.core as mx
from mlx.utils import tree_map
from test_dpo_command import command, metrics_of
from tiny import ROWS, random_pairs, save_rows, save_tiny_model, tiny_model

from mlx_lm import dpo
from mlx_lm.preference import ranks
from mlx_lm.preference.coupled import gather_pairs
from mlx_lm.preference.errors import InputError
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.ranks import (
    average_over_ranks,
    on_all_ranks,
    sum_over_ranks,
)
from mlx_lm.preference.run import identity
from mlx_lm.preference.run.checkpoint import TrainingState
from mlx_lm.preference.run.resume import Stoppable
from mlx_lm.preference.settings import together
from mlx_lm.preference.settings.table import CONFIG_DEFAULTS, names
from mlx_lm.preference.settings.together import is_lost_rank, start_together

LAUNCHER = Path(sys.executable).parent / "mlx.launch"
HAS_RING = LAUNCHER.exists() and mx.distributed.is_available("ring")
TIMES = ("pairs_per_second", "tokens_per_second", "val_time", "compile_seconds")
# What differs although the run does not: time and memory.
APART = {*TIMES, "peak_memory"}

# The command, with a third step whose numbers are not finite on the last rank alone.
POISONED = """
import mlx.core as mx
from mlx_lm.dpo import main
from mlx_lm.preference.run.loop import PreferenceRun
from mlx_lm.preference.reference.remembered import RememberedReference

take_step, recall = PreferenceRun._take_step, RememberedReference.recall
step = [0]

def count(self, it, batch):
    step[0] = it
    take_step(self, it, batch)
    step[0] = 0

def spoil(self, dataset, batch):
    arrays = recall(self, dataset, batch)
    world = mx.distributed.init()
    if step[0] != 3 or world.rank() < world.size() - 1:
        return arrays
    return arrays | {"reference_logps": mx.full((2 * arrays["weights"].size,), mx.nan)}

PreferenceRun._take_step, RememberedReference.recall = count, spoil
main()
"""


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
        save_rows(cls.data, ROWS[:9], ("valid", "test"))
        cls.one = cls.root / "one"
        code, _, err = command(*cls.flags(cls.one))
        assert code == 0, err

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
    def start(cls, ranks, flags, script=None):
        command = [script] if script else ["-m", "mlx_lm", "dpo"]
        words = [sys.executable, *command, *flags]
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
    def run_ranks(cls, ranks, flags, script=None):
        process = cls.start(ranks, flags, script)
        try:
            return process.communicate(timeout=300)[0]
        finally:
            process.kill()

    def assert_like_one(self, folder, one=None):
        one = one or self.one
        lines, expected = metrics_of(folder), metrics_of(one)
        self.assertEqual(len(lines), len(expected))
        for line, right in zip(lines, expected):
            self.assertEqual(line.keys(), right.keys())
            for key in right.keys() - APART:
                scale = max(1.0, abs(right[key]))
                self.assertLess(abs(line[key] - right[key]) / scale, 1e-5, key)
        weights, expected = (
            mx.load(str(f / "adapters.safetensors")) for f in (folder, one)
        )
        self.assertEqual(weights.keys(), expected.keys())
        for key, x in expected.items():
            self.assertLess(mx.abs(weights[key] - x).max().item(), 1e-5, key)

    def test_ranks_equal_one(self):
        """Two from the start; one and four that go on with what two began."""
        two = self.root / "two"
        out = self.run_ranks(2, self.flags(two))
        self.assertEqual(out.count("Saved the adapter"), 1, out)
        self.assertEqual(out.count("Loading datasets"), 1, out)
        names = lambda folder: {p.name for p in folder.iterdir()}
        self.assertEqual(names(two), names(self.one))
        self.assert_like_one(two)
        val = [line["val_pairs"] for line in metrics_of(two) if "val_pairs" in line]
        self.assertEqual(set(val), {9.0})
        # As if killed after step 5, half of an update.
        (two / "0000009_state.safetensors").unlink()
        for count in (1, 4):
            with self.subTest(ranks=count):
                folder = shutil.copytree(two, self.root / f"resumed on {count}")
                flags = ["--resume", folder]
                out = command(*flags)[1] if count == 1 else self.run_ranks(4, flags)
                self.assertIn("Going on after step 5 of 9", out)
                self.assert_like_one(folder)

    def test_all_ranks_stop_early_and_have_the_best(self):
        early = ("--early-stopping", 1, "--load-best", "--steps-per-eval", 1, "--test")
        for count in (1, 2):
            folder = self.root / f"early {count}"
            flags = self.flags(folder, "--learning-rate", 0.1, *early)
            out = self.run_ranks(count, flags)
            self.assertEqual(out.count("Stopped early after step "), 1, out)
            self.assertEqual(out.count("adapters.safetensors is the best one"), 1)
        self.assertLess(metrics_of(folder)[-1]["iteration"], 9)
        self.assert_like_one(folder, self.root / "early 1")
        tests = [self.root / f"early {n}" / "test_metrics.json" for n in (1, 2)]
        one, two = (json.loads(path.read_text())["loss"] for path in tests)
        self.assertAlmostEqual(one, two, places=5)

    def test_a_step_is_skipped_on_all_ranks(self):
        script = self.root / "poisoned.py"
        script.write_text(POISONED)
        rows = []
        for count in (1, 2):
            folder = self.root / f"poisoned {count}"
            out = self.run_ranks(count, self.flags(folder), script)
            found = re.findall(r"Step 3 skipped: [^(]*\(rows ([^)]+)\)", out)
            self.assertEqual(len(found), 1, out)
            rows.append(sorted(found[0].split(", ")))
        self.assertEqual(len(rows[0]), 4)
        self.assertEqual(rows[0], rows[1])
        self.assert_like_one(folder, self.root / "poisoned 1")

    def test_batch_that_ranks_cannot_share(self):
        folder = self.root / "odd"
        out = self.run_ranks(2, self.flags(folder, "--batch-size", 3))
        self.assertEqual(out.count("Error: "), 1, out)
        self.assertIn("batch_size is 3", out)
        self.assertIn("exited with code 2", out)
        self.assertFalse(folder.exists())

    def test_a_rank_with_other_settings_and_another_model(self):
        script = self.root / "other.py"
        other = save_tiny_model(self.root / "other", rms_norm_eps=1e-3)
        script.write_text(
            "import sys, mlx.core as mx\nfrom mlx_lm.dpo import main\n"
            "if mx.distributed.init().rank():\n"
            f"    sys.argv += {['--grad-accumulation-steps', '3', '--model', str(other)]}\n"
            "main()\n"
        )
        folder = self.root / "mixed"
        out = self.run_ranks(2, self.flags(folder), script)
        self.assertEqual(out.count("Error: "), 1, out)
        self.assertIn(
            "Rank 1 differs from rank 0 in grad_accumulation_steps, the model's "
            "weights, the reference's weights: give",
            out,
        )
        self.assertNotIn("val 0", out)

    def start_long(self, folder, count=2):
        flags = self.flags(folder, "--iters", 100_000, "--steps-per-eval", 100_000)
        process = self.start(count, flags)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.kill)
        deadline = time.time() + 300
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
        out = process.communicate(timeout=300)[0]
        self.assertEqual(out.count("Go on with: --resume"), 1, out)
        self.assertEqual(out.count("exited with code 143"), 2, out)

    def test_a_lost_rank_ends_the_others(self):
        folder = self.root / "lost"
        process, children = self.start_long(folder)
        os.kill(children[-1], signal.SIGKILL)
        tic = time.time()
        out = process.communicate(timeout=300)[0]
        self.assertLess(time.time() - tic, 30)
        self.assertIn("Rank lost", out)
        self.assertIn(f"--resume {folder}", out)
        self.assertNotIn("Traceback", out)
        saved = max(int(p.name[:7]) for p in folder.glob("*_state.safetensors"))
        out = command("--resume", folder, "--iters", saved + 2)[1]
        self.assertIn("Going on after step", out)


# A loss of all ranks' pairs, compiled with its gradient, as a step would.
GATHERING = """
import json, sys
import mlx.core as mx
from mlx_lm.preference.coupled import gather_pairs
from mlx_lm.preference.ranks import average_over_ranks

world = mx.distributed.init()
rank, pairs = world.rank(), 6 // world.size()
own = slice(rank * pairs, (rank + 1) * pairs)
x = mx.sin(mx.arange(6) * 1.7)
w = mx.cos(mx.arange(12)).reshape(6, 2)

def loss(scale, x, w):
    y, mine = gather_pairs({"x": scale * x, "w": w * scale})
    coupled = mx.sort(y["x"])[::-1] * mx.arange(6) * (y["w"] ** 2).sum(axis=1)
    return mx.exp(coupled).sum() + y["x"][mine].sum(), y

step = mx.compile(lambda *a: mx.value_and_grad(loss)(*a))
(value, y), gradient = step(mx.array(0.8), x[own], w[own])
# A sum over ranks of what each one's own pairs contribute.
mean = average_over_ranks({"g": gradient})["g"]
rows = [v.tolist() for k, v in sorted(y.items())]
line = [value.item(), mean.item() * world.size(), gradient.item(), rows]
print(json.dumps(line), file=open(f"{sys.argv[1]}/{world.size()}-{rank}", "w"))
"""


@unittest.skipUnless(HAS_RING, "mlx.launch or its ring backend is not there")
class TestGathering(unittest.TestCase):
    def test_ranks_equal_one(self):
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "script.py"
            script.write_text(GATHERING)
            with mock.patch.object(sys, "argv", [str(script), folder]):
                runpy.run_path(str(script))
            ring = ["-n", "2", "--backend", "ring", "--starting-port", str(free_port())]
            words = [
                sys.executable,
                LAUNCHER,
                *ring,
                sys.executable,
                str(script),
                folder,
            ]
            subprocess.run(words, check=True, timeout=300, capture_output=True)
            one, first, second = (
                json.loads((Path(folder) / name).read_text())
                for name in ("1-0", "2-0", "2-1")
            )
        for rank in (first, second):
            self.assertEqual(rank[3], one[3])
            # All ranks' sum, but for what each adds for its own pairs.
            self.assertAlmostEqual(rank[1], one[1], places=3)
        own = [sum(one[3][1][i : i + 3]) for i in (0, 3)]
        for rank, mine in zip((first, second), own):
            self.assertAlmostEqual(rank[0] - mine, one[0] - sum(own), places=3)
        self.assertAlmostEqual(first[2] + second[2], one[2], places=3)
        self.assertNotAlmostEqual(first[2], second[2], places=2)


class TestMessages(unittest.TestCase):
    def test_a_rank_gathers_with_one_message(self):
        group = mock.Mock(**{"size.return_value": 3, "rank.return_value": 1})
        others, sent = mx.array([[[7.0] * 3] * 2, [[9.0] * 3] * 2]), []

        def send(x, group):
            sent.append(x)
            return mx.concatenate([others[0], x, others[1]])

        a = mx.array([1.0, 2.0], dtype=mx.bfloat16)
        b = mx.array([[3.0, 4.0], [5.0, 6.0]])
        with (
            mock.patch.object(mx.distributed, "init", lambda: group),
            mock.patch.object(mx.distributed, "all_gather", send),
        ):
            y, own = gather_pairs({"b": b, "a": a})
            gradients = mx.grad(
                lambda a, b: sum(
                    (mx.arange(1, x.size + 1).reshape(x.shape) * x).sum()
                    for x in gather_pairs({"b": b, "a": a})[0].values()
                ),
                (0, 1),
            )(a, b)
        self.assertEqual(own, slice(2, 4))
        self.assertEqual([x.shape for x in sent], [(2, 3)] * 2)
        self.assertEqual(y["a"].dtype, mx.float32)
        self.assertEqual(y["a"].tolist(), [7.0, 7.0, 1.0, 2.0, 9.0, 9.0])
        self.assertEqual(y["b"].shape, (6, 2))
        self.assertEqual(y["b"][own].tolist(), b.tolist())
        self.assertEqual(gradients[0].tolist(), [3.0, 4.0])
        self.assertEqual(gradients[1].tolist(), [[5.0, 6.0], [7.0, 8.0]])

    def test_alone_nothing_is_sent(self):
        tree = {"a": [mx.array([1.0, 2.0])], "b": mx.array(3.0)}
        self.assertIs(average_over_ranks(tree), tree)
        pairs, own = gather_pairs(rows := {"a": mx.array([1.0, 2.0])})
        self.assertIs(pairs, rows)
        self.assertEqual(own, slice(0, 2))
        sums = sum_over_ranks({"b": mx.array(3.0)})
        self.assertEqual(sums["b"].item(), 3.0)
        self.assertEqual(sum_over_ranks({}), {})
        self.assertTrue(on_all_ranks(mx.array(True)).item())
        self.assertFalse(on_all_ranks(mx.array(False)).item())
        self.assertFalse(start_together())
        self.assertTrue(start_together(failed=True))

    def start_two(self, ours, theirs, rank=0, failed=False):
        """Start a rank beside another one, whose inputs are given or which failed."""
        group = mock.Mock(**{"size.return_value": 2, "rank.return_value": 1 - rank})
        sent = []

        def gather(row, group):
            sent.append(row.tolist()[0])
            rows = sent if len(sent) == 1 else sent[::-1] if rank == 0 else sent
            return mx.array(rows, dtype=mx.uint32)

        with (
            mock.patch.object(mx.distributed, "init", lambda: group),
            mock.patch.object(mx.distributed, "all_gather", gather),
        ):
            with mock.patch.object(together, "_started", []):
                start_together(failed, lambda: theirs)
            group.rank.return_value = rank
            with mock.patch.object(together, "_started", []):
                return start_together(inputs=lambda: ours)

    def test_ranks_that_start_with_other_inputs(self):
        ours = {"beta": 0.1, "the training pairs": "5 pairs"}
        for rank in (0, 1):
            self.assertFalse(self.start_two(ours, {**ours}, rank))
            with self.assertRaises(SystemExit) as caught:
                self.start_two(ours, {}, rank, failed=True)
            self.assertEqual(caught.exception.code, 2)
        for change, pattern in (
            ({"beta": 0.2}, "in beta: give"),
            ({"beta": None, "the training pairs": ""}, "in beta, the training pairs:"),
            ({"gamma": 1}, "in its version of mlx_lm"),
        ):
            with self.assertRaisesRegex(ValueError, f"Rank 1 differs .*{pattern}"):
                self.start_two(ours, ours | change)
            with self.assertRaises(SystemExit) as caught:
                self.start_two(ours, ours | change, rank=1)
            self.assertEqual(caught.exception.code, 2)

    def test_every_setting_is_compared_or_a_ranks_own(self):
        def start(**change):
            args = SimpleNamespace(**{**CONFIG_DEFAULTS, **change})
            with mock.patch.object(together, "start_together") as told:
                together.agree(args, dict)
            return told.call_args.kwargs["inputs"]()

        for name in CONFIG_DEFAULTS:
            theirs = start(**{name: "another"})
            if name in names(per_rank=True):
                self.assertFalse(self.start_two(start(), theirs))
                continue
            with self.assertRaisesRegex(ValueError, f"from rank 0 in {name}: give"):
                self.start_two(start(), theirs)

    def test_what_was_loaded_is_compared(self):
        model, pairs = tiny_model("lora"), random_pairs(4)
        seen = [str(identity.tested(model, FrozenStart(model), pairs))]
        seen.append(str(identity.tested(model, FrozenStart(model), pairs[:3])))
        seen.append(str(identity.tested(model, tiny_model(), pairs)))
        model.update(tree_map(lambda x: x + 1, model.trainable_parameters()))
        seen.append(str(identity.tested(model, FrozenStart(model), pairs)))
        with tempfile.TemporaryDirectory() as folder:
            adapter = Path(folder) / "adapters.safetensors"
            for value in (1.0, 2.0):
                mx.save_safetensors(str(adapter), {"x": mx.array(value)})
                for step in (3, 4):
                    state = TrainingState(step, {"m": mx.zeros(2)}, {}, adapter)
                    seen.append(str(identity.rank_inputs({"train": "0"}, state)))
        self.assertEqual(len(set(seen)), 8)

    def test_whatever_ends_a_rank_is_told_to_the_others(self):
        told = mock.Mock(return_value=True)
        for error, debug, code in (
            (KeyError("a bug"), "", None),
            (InputError("bad"), "", 2),
            (InputError("bad"), "1", None),
            (RuntimeError("[ring] lost"), "", 1),
        ):
            told.reset_mock()
            with (
                mock.patch.object(dpo, "resolve_args", mock.Mock(side_effect=error)),
                mock.patch.object(together, "start_together", told),
                mock.patch.dict(os.environ, MLX_LM_DEBUG=debug),
                contextlib.redirect_stderr(io.StringIO()) as err,
                self.assertRaises(SystemExit if code else type(error)) as caught,
            ):
                dpo.main()
            if code:
                self.assertEqual(caught.exception.code, code)
            self.assertEqual(err.getvalue().count("\n"), 1 if code else 0)
            # The connection to a lost one is gone.
            expected = [] if "ring" in str(error) else [mock.call(failed=True)]
            self.assertEqual(told.mock_calls, expected)

    def test_only_what_was_trained_can_go_on(self):
        words = ["--train", "--adapter-path", "my runs"]
        go_on = "Go on with: --resume 'my runs'"
        for begun, text in ((True, go_on), (False, "Nothing was")):
            with (
                mock.patch.object(dpo, "run", side_effect=RuntimeError("[ring] lost")),
                mock.patch.object(together, "_together", [True] * begun),
                mock.patch.object(sys, "argv", ["", *words]),
                contextlib.redirect_stderr(io.StringIO()) as err,
                self.assertRaises(SystemExit),
            ):
                dpo.main()
            self.assertIn(text, err.getvalue())

    def test_a_rank_that_is_ended_before_training_says_so(self):
        """A launcher ends the others when one has died, wherever they are."""
        before = signal.getsignal(signal.SIGTERM)
        self.addCleanup(signal.signal, signal.SIGTERM, before)
        end = lambda *_: signal.raise_signal(signal.SIGTERM)
        for rank, lines in ((0, 1), (1, 0)):
            group = mock.Mock(**{"size.return_value": 2, "rank.return_value": rank})
            with (
                mock.patch.object(mx.distributed, "init", lambda: group),
                mock.patch.object(dpo, "resolve_args", end),
            ):
                code, _, err = command()
            self.assertEqual((code, err.count("Rank lost, if")), (143, lines))
            # The launcher's next signal must not change the code of the first.
            self.assertIs(signal.getsignal(signal.SIGTERM), signal.SIG_IGN)

    def test_sums_are_one_message(self):
        twice = mock.Mock(side_effect=lambda x, group: 2 * x)
        with mock.patch.object(ranks.mx.distributed, "all_sum", twice):
            sums = sum_over_ranks({"b": mx.array(3.0), "a": mx.array([[1.0, 2.0]])})
        self.assertEqual(twice.call_count, 1)
        self.assertEqual(sums["a"].tolist(), [[2.0, 4.0]])
        self.assertEqual(sums["b"].item(), 6.0)

    def test_a_signal_while_a_rank_waits_is_kept(self):
        run = mock.Mock(**{"world.size.return_value": 2, "stop.exit_code": 0})

        def wait(code, group):
            # Comes between what this rank sent and the answer.
            run.stop.exit_code = 143
            return code

        with mock.patch.object(ranks.mx.distributed, "all_max", wait):
            self.assertFalse(Stoppable.must_stop(run, run.world))
        self.assertEqual(run.stop.exit_code, 143)

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
