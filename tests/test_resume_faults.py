# Copyright © 2026 MLX Contributors

import contextlib
import io
import math
import shutil
import signal
import subprocess
import sys
import unittest
from pathlib import Path
from unittest import mock

import mlx.core as mx
from resuming import STEPS, FolderCase, Setup, bits, lines_of, result, signals
from test_dpo_command import CommandCase, command

from mlx_lm.preference.run.checkpoint import (
    TrainingState,
    drop_newer,
    drop_old,
    load_state,
    newest_state,
    numbered,
    save_state,
)
from mlx_lm.preference.run.loop import PreferenceRun
from mlx_lm.preference.run.signals import StopSignals
from mlx_lm.tuner.callbacks import TrainingCallback


class At(TrainingCallback):
    """Calls a function at the report of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_train_loss_report(self, train_info):
        if train_info["iteration"] == self.step:
            self.act()


# In a validation of the command's tiny data.
BATCHES = 6


class TestSignals(CommandCase):
    """Through the command: the step is finished, the run saved."""

    def setUp(self):
        super().setUp()
        # A shell's background processes ignore Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, before)
        self.more = ["--steps-per-report", 2, "--steps-per-eval", 3, "--save-every", 4]
        self.more += ["--iters", 7, "--batch-size", 2]

    def run_flags(self):
        return self.flags(*self.more)

    def whole(self):
        """The result of the run when nothing breaks it off."""
        folder = self.folder / "whole"
        self.succeed(*self.run_flags(), "--adapter-path", folder)
        return result(folder)

    def check_resumed(self, extra=()):
        expected = self.whole()
        out = self.succeed("--resume", self.adapters)
        found = result(self.adapters)
        for part in ("adapter", "state", "metrics"):
            self.assertTrue(found[part] == expected[part], part)
        more = [n for n in found["files"] if n not in expected["files"]]
        self.assertEqual([n for n in more if "_state." not in n], [*extra])
        return out

    def test_term_in_a_step(self):
        with signals("_take_step", 5):
            code, out, err = command(*self.run_flags())
        self.assertEqual((code, err), (143, ""))
        self.assertIn(
            f"Stopped after step 5. Go on with: --resume {self.adapters}", out
        )
        self.assertEqual(newest_state(self.adapters).iteration, 5)
        self.assertNotIn("Saved the adapter", out)
        out = self.check_resumed(["0000005_adapters.safetensors"])
        self.assertIn("Going on after step 5 of 7.", out)

    def test_interrupt_in_a_validation(self):
        for batch, step in ((3, 0), (BATCHES + 1, 3), (3 * BATCHES, 6)):
            with self.subTest(step=step):
                shutil.rmtree(self.adapters, ignore_errors=True)
                with signals("_score_batch", batch, number=signal.SIGINT):
                    code, out, err = command(*self.run_flags())
                self.assertEqual((code, err), (130, ""))
                self.assertIn(f"Stopped after step {step}.", out)
                state = newest_state(self.adapters)
                self.assertEqual((state.iteration, state.info["pending"]), (step, True))
                self.check_resumed([f"{step:07d}_adapters.safetensors"])

    def test_in_the_last_validation(self):
        with signals("_score_batch", 4 * BATCHES):
            self.assertEqual(command(*self.run_flags())[0], 143)
        self.check_resumed()
        self.assertFalse(newest_state(self.adapters).info["pending"])

    def test_stopped_again_and_again(self):
        with signals("_take_step", 1):
            self.assertEqual(command(*self.run_flags())[0], 143)
        for method, call in (("_take_step", 1), ("_score_batch", 2), ("_take_step", 2)):
            with signals(method, call):
                self.assertEqual(command("--resume", self.adapters)[0], 143)
        self.check_resumed([f"000000{i}_adapters.safetensors" for i in (1, 2, 3, 5)])

    def test_second_signal_ends_it_at_once(self):
        with signals("_take_step", 5, number=signal.SIGINT):
            with signals("_after_step", 5, number=signal.SIGINT):
                code, out, err = command(*self.run_flags())
        self.assertEqual((code, err), (130, "Error: interrupted.\n"))
        self.assertNotIn("Stopped after", out)
        self.check_resumed()

    def test_handlers_are_put_back(self):
        before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        with StopSignals() as stop:
            self.assertEqual(stop.exit_code, 0)
            signal.raise_signal(signal.SIGINT)
            self.assertEqual(stop.exit_code, 130)
            # The next one has its usual effect.
            after = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
            self.assertEqual(after, before)
        self.assertEqual(stop.exit_code, 130)
        with StopSignals(patient=True) as stop:
            stop.beat()
            signal.raise_signal(signal.SIGINT)
            # The launcher's own signal changes nothing.
            signal.raise_signal(signal.SIGTERM)
            self.assertEqual(stop.exit_code, 130)
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            self.assertEqual(signal.getsignal(number), signal.SIG_IGN)
            signal.signal(number, handler)
        # Nor does it end a rank before this one has said why it failed.
        with self.assertRaises(RuntimeError), StopSignals(patient=True):
            raise RuntimeError("[ring] lost")
        signal.raise_signal(signal.SIGTERM)
        with StopSignals() as stop:
            stop.ignore()
            signal.raise_signal(signal.SIGTERM)
            self.assertEqual(stop.exit_code, 0)
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
        with StopSignals():
            self.assertNotEqual(signal.getsignal(signal.SIGTERM), before[1])
        self.assertEqual(signal.getsignal(signal.SIGTERM), before[1])


# A rank that waits where no handler of Python's runs.
WAITING = """
import ctypes, os, signal, threading, time
from mlx_lm.preference.run import signals as stop_signals

stop_signals.PATIENCE = 0.4
with stop_signals.StopSignals(True, "Go on.") as stop:
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    {wait}
print("went on", stop.exit_code)
"""


class TestGuard(unittest.TestCase):
    """A signal ends a rank that waits for one that is gone, and no other."""

    def run_waiting(self, wait):
        words = [sys.executable, "-c", WAITING.format(wait=wait)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
        return done.returncode, done.stdout, done.stderr

    def test_one_that_waits(self):
        waiting = "ctypes.CDLL(None).sleep(9); ctypes.CDLL(None).sleep(9)"
        code, out, err = self.run_waiting(waiting)
        self.assertEqual((code, out), (1, ""))
        self.assertEqual(err, "Error: Rank lost: the others do not answer. Go on.\n")

    def test_one_that_moves(self):
        moving = "[(stop.beat(), time.sleep(0.1)) for _ in range(12)]"
        self.assertEqual(self.run_waiting(moving), (0, "went on 143\n", ""))

    def test_one_that_saves(self):
        saving = "time.sleep(0.3); stop.ignore(); time.sleep(0.9)"
        self.assertEqual(self.run_waiting(saving), (0, "went on 143\n", ""))


class TestFiles(FolderCase):
    """Which checkpoints there are, and which one is taken."""

    def names(self, folder):
        paths = sorted(Path(folder).glob("[0-9]*"))
        return [path.name.split(".")[0].lstrip("0") for path in paths]

    def start(self, **args):
        folder = self.folder / "run"
        Setup(val_batches=1).start(folder, **args)
        return folder

    def test_how_many_are_kept(self):
        folder = self.start(keep_checkpoints=None, steps_per_save=3, iters=10)
        self.assertEqual(
            self.names(folder),
            [*("3_adapters", "6_adapters", "9_adapters", "9_state")]
            + ["10_adapters", "10_state"],
        )
        for keep in (1, 3):
            shutil.rmtree(folder)
            self.start(keep_checkpoints=keep, steps_per_save=2)
            expected = [
                f"{step}_{name}"
                for step in (4, 6, 8, 9)[-keep:]
                for name in ("adapters", "state")
            ]
            self.assertEqual(self.names(folder), expected)

    def test_only_an_own_adapter_is_dropped(self):
        for step in (2, 4, 8):
            numbered(self.folder, step, "adapters").write_bytes(b"")
        for step in (2, 4):
            save_state(self.folder, step, {}, {})
        drop_old(self.folder, 1)
        self.assertEqual(
            self.names(self.folder), ["4_adapters", "4_state", "8_adapters"]
        )
        drop_newer(self.folder, 4)
        self.assertEqual(len(self.names(self.folder)), 3)
        drop_newer(self.folder, 3)
        self.assertEqual(self.names(self.folder), ["4_adapters", "8_adapters"])

    def test_state_as_written(self):
        arrays = {
            "a": mx.array([1.5, float("nan")]),
            "b.c": mx.array(3, mx.uint64),
            "empty": mx.zeros((0, 2)),
            "d": mx.ones((2, 3), mx.bfloat16),
        }
        info = {"best": 0.1 + 0.2, "identity": {"train": "ä"}}
        numbered(self.folder, 5, "adapters").write_bytes(b"weights")
        state = load_state(save_state(self.folder, 5, arrays, info))
        self.assertIsInstance(state, TrainingState)
        self.assertEqual((state.iteration, state.info), (5, info))
        self.assertEqual(state.arrays.keys(), arrays.keys())
        for name, x in arrays.items():
            self.assertEqual(x.dtype, state.arrays[name].dtype)
            self.assertTrue(mx.array_equal(x, state.arrays[name], equal_nan=True))

    def test_damage_costs_one_checkpoint(self):
        whole = self.start(keep_checkpoints=2)
        expected = result(whole)

        def flip(path):
            raw = bytearray(path.read_bytes())
            raw[-200] ^= 1
            path.write_bytes(raw)

        def cut(path):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

        damages = {
            "flipped": ("state", flip),
            "cut": ("state", cut),
            "empty": ("state", lambda path: path.write_bytes(b"")),
            "text": ("state", lambda path: path.write_text("{}")),
            "no weights": ("adapters", Path.unlink),
            "cut weights": ("adapters", cut),
        }
        for name, (kind, damage) in damages.items():
            with self.subTest(name):
                broken = shutil.copytree(whole, self.folder / name)
                damage(numbered(broken, STEPS, kind))
                out = io.StringIO()
                with contextlib.redirect_stdout(out):
                    state = newest_state(broken)
                self.assertEqual(state.iteration, STEPS - 1)
                self.assertRegex(out.getvalue(), r"\A\[WARNING\] .*\n\Z")
                Setup(val_batches=1).start(broken, state, keep_checkpoints=2)
                self.assertTrue(result(broken) == expected)

    def test_a_damaged_state_is_not_kept_as_a_good_one(self):
        folder = self.start(steps_per_save=4, keep_checkpoints=2)
        numbered(folder, STEPS, "state").write_bytes(b"")
        with contextlib.redirect_stdout(io.StringIO()):
            state = newest_state(folder)
        run = Setup(val_batches=1)
        with self.assertRaises(ZeroDivisionError):
            run.start(
                folder, state, steps_per_save=4, callback=At(STEPS, lambda: 1 / 0)
            )
        self.assertEqual(self.names(folder)[-1], f"{STEPS}_adapters")

    def test_all_damaged(self):
        folder = self.start(keep_checkpoints=2)
        for path in folder.glob("*_state.safetensors"):
            path.write_bytes(b"")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            self.assertIsNone(newest_state(folder))
        self.assertEqual(out.getvalue().count("[WARNING]"), 2)

    def test_best(self):
        for name, sign, metric in (
            ("loss", -1, "val_loss"),
            ("accuracy", 1, "val_rewards/accuracies"),
        ):
            folder = self.folder / name
            folder.mkdir()
            (folder / "adapter_config.json").write_text("{}")
            Setup(save_best=name, val_batches=-1).start(folder, steps_per_eval=1)
            lines = [line for line in lines_of(folder) if metric in line][1:]
            best = max(lines, key=lambda line: sign * line[metric])
            step = numbered(folder, best["iteration"], "adapters")
            files = sorted(path.name for path in (folder / "best").iterdir())
            self.assertEqual(files, ["adapter_config.json", "adapters.safetensors"])
            self.assertTrue(
                bits(folder / "best" / "adapters.safetensors") == bits(step)
            )

    def test_a_best_is_a_number(self):
        run = mock.Mock(best=None, rank=1, args=mock.Mock(save_best="loss"))
        for it, loss, best in ((0, 0.1, None), (1, math.nan, None), (2, 0.5, -0.5)):
            PreferenceRun._keep_best(run, it, {"loss": loss})
            self.assertEqual(run.best, best)
        for loss, best in ((math.nan, -0.5), (0.6, -0.5), (0.4, -0.4)):
            PreferenceRun._keep_best(run, 3, {"loss": loss})
            self.assertEqual(run.best, best)


if __name__ == "__main__":
    unittest.main()
