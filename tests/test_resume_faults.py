# Copyright © 2026 MLX Contributors

import contextlib
import io
import json
import math
import shutil
import signal
import subprocess
import sys
import unittest
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
from folders import FolderCase
from resuming import STEPS, Setup, bits, lines_of, result, signals
from test_dpo_command import CommandCase, command
from test_folder_lock import content
from tiny import random_pairs

from mlx_lm.preference.errors import InputError
from mlx_lm.preference.reference.cache import ReferenceCache, pair_key
from mlx_lm.preference.run.checkpoint import (
    TrainingState,
    drop_newer,
    load_state,
    newest_state,
    numbered,
    save_state,
)
from mlx_lm.preference.run.signals import WARNINGS, StopSignals
from mlx_lm.tuner.callbacks import TrainingCallback


class At(TrainingCallback):
    """Calls a function at the report of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_train_loss_report(self, train_info):
        if train_info["iteration"] == self.step:
            self.act()


def flip(path):
    """Change one bit."""
    raw = bytearray(path.read_bytes())
    raw[-200] ^= 1
    path.write_bytes(raw)


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

    def test_a_closed_terminal(self):
        # Under nohup the tests would inherit that it is ignored.
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
        self.addCleanup(signal.signal, signal.SIGHUP, before)
        # Said by the shell and by the terminal.
        with signals("_take_step", 5, number=signal.SIGHUP):
            with signals("_after_step", 5, number=signal.SIGHUP):
                code, _, err = command(*self.run_flags())
        self.assertEqual((code, err), (129, ""))
        self.assertEqual(newest_state(self.adapters).iteration, 5)
        self.check_resumed(["0000005_adapters.safetensors"])

    def test_a_batch_system_warns(self):
        for number in WARNINGS:
            with self.subTest(signal.Signals(number).name):
                shutil.rmtree(self.adapters, ignore_errors=True)
                with signals("_take_step", 5, number=number):
                    code, _, err = command(*self.run_flags())
                self.assertEqual((code, err), (128 + number, ""))
                self.assertEqual(newest_state(self.adapters).iteration, 5)
                self.assertEqual(signal.getsignal(number), signal.SIG_DFL)

    def test_nohup(self):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGHUP, before)
        with signals("_take_step", 5, number=signal.SIGHUP):
            self.succeed(*self.run_flags())
        self.assertEqual(signal.getsignal(signal.SIGHUP), signal.SIG_IGN)

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

stop_signals.PATIENCE = 1.5
with stop_signals.StopSignals(True, "Go on.") as stop:
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    {wait}
print("went on", stop.exit_code)
"""


class TestGuard(unittest.TestCase):
    """A signal ends a rank that waits for one that is gone, and no other."""

    def run_waiting(self, wait):
        words = [sys.executable, "-c", WAITING.format(wait=wait)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout, done.stderr

    def test_one_that_waits(self):
        waiting = "ctypes.CDLL(None).sleep(9); ctypes.CDLL(None).sleep(9)"
        code, out, err = self.run_waiting(waiting)
        self.assertEqual((code, out), (1, ""))
        self.assertEqual(err, "Error: Rank lost: the others do not answer. Go on.\n")

    def test_one_that_moves(self):
        moving = "[(stop.beat(), time.sleep(0.1)) for _ in range(20)]"
        self.assertEqual(self.run_waiting(moving), (0, "went on 143\n", ""))

    def test_one_that_saves(self):
        saving = "time.sleep(0.3); stop.ignore(); time.sleep(2)"
        self.assertEqual(self.run_waiting(saving), (0, "went on 143\n", ""))


class TestNothingToGoOnWith(CommandCase):
    """Where checkpoints were made and none can be used, nothing is begun or touched."""

    def lose(self, name, change):
        for path in self.adapters.glob(name):
            change(path)

    def other_version(self, path):
        arrays, metadata = mx.load(str(path), return_metadata=True)
        mx.save_safetensors(str(path), arrays, {**metadata, "version": "1"})

    def test_what_was_lost(self):
        self.succeed(*self.flags("--save-every", 1))
        whole = shutil.copytree(self.adapters, self.folder / "whole")
        states, adapters = "*_state.safetensors", "*adapters.safetensors"
        losses = {
            "adapters deleted": (
                adapters,
                Path.unlink,
                "adapters.safetensors is missing",
            ),
            "adapters damaged": (adapters, flip, "is damaged, or not the one that"),
            "states damaged": (states, flip, "0000003_state.safetensors is damaged"),
            "states emptied": (
                states,
                lambda path: path.write_bytes(b""),
                "can't be read",
            ),
            "another version": (states, self.other_version, "of another version"),
            "states deleted": (states, Path.unlink, "no checkpoint to go on with"),
        }
        for name, (files, change, what) in losses.items():
            shutil.rmtree(self.adapters)
            shutil.copytree(whole, self.adapters)
            self.lose(files, change)
            before = content(self.adapters)
            with self.subTest(name):
                code, _, err = command("--resume", self.adapters)
                self.assertEqual(code, 2)
                self.assertRegex(
                    err,
                    rf"\AError: {self.adapters} has .*{what}.* Restore its files, or give "
                    r"--restart to begin again at step 0 and overwrite what is there\.\n\Z",
                )
                self.assertEqual(content(self.adapters), before)
        out = self.succeed("--resume", self.adapters, "--restart")
        self.assertIn("The run begins again at step 0.", out)
        self.assertEqual(bits(self.last(self.adapters)), bits(self.last(whole)))
        saved = json.loads((self.adapters / "adapter_config.json").read_text())
        self.assertFalse(saved["restart"])

    def test_numbered_adapters_deleted_to_save_room(self):
        self.succeed(*self.flags("--save-every", 1))
        self.lose("[0-9]*_adapters.safetensors", Path.unlink)
        out = self.succeed("--resume", self.adapters, "--iters", 5)
        self.assertIn("Going on after step 3 of 5.", out)
        whole = self.folder / "whole"
        self.succeed(*self.flags("--iters", 5, "--adapter-path", whole))
        self.assertEqual(bits(self.last(self.adapters)), bits(self.last(whole)))

    def test_killed_in_the_first_save(self):
        self.succeed(*self.flags("--save-every", 1))
        for path in self.adapters.glob("*.safetensors"):
            if path.name != "0000001_adapters.safetensors":
                path.unlink()
        out = self.succeed("--resume", self.adapters)
        self.assertIn("has no checkpoint yet: the run starts again", out)

    def test_the_last_adapter_is_that_of_the_last_state(self):
        self.succeed(*self.flags("--save-every", 1))
        # Killed between the two.
        shutil.copyfile(
            numbered(self.adapters, 1, "adapters"), self.last(self.adapters)
        )
        self.succeed("--resume", self.adapters)
        whole = numbered(self.adapters, 3, "adapters")
        self.assertEqual(bits(self.last(self.adapters)), bits(whole))

    def last(self, folder):
        return folder / "adapters.safetensors"

    def test_restart_is_of_a_run_that_is_resumed(self):
        self.fail_in_one_line("restart needs resume", *self.flags("--restart"))


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

    def test_only_own_checkpoints_are_dropped(self):
        others = self.folder / "0000001_adapters.safetensors"
        theirs = numbered(self.folder, 700, "state")
        for path in (others, theirs):
            path.write_bytes(b"of somebody else")
        with contextlib.redirect_stdout(io.StringIO()):
            with self.assertRaises(SystemExit), signals("_take_step", 4):
                Setup().start(self.folder, keep_checkpoints=1, steps_per_save=2)
        self.assertEqual(
            self.names(self.folder),
            ["1_adapters", "2_adapters", "2_state", "4_adapters", "4_state"]
            + ["700_state"],
        )
        out = Setup().start(self.folder, keep_checkpoints=1, steps_per_save=5)
        self.assertIn("has checkpoints of an earlier run, such as 0000700_state", out)
        self.assertEqual(
            self.names(self.folder),
            ["1_adapters", "2_adapters", "2_state", "4_adapters", "4_state"]
            + ["9_adapters", "9_state", "700_state"],
        )
        drop_newer(self.folder, 9)
        self.assertNotIn("700_state", self.names(self.folder))

    def test_numbers_of_any_length(self):
        folder = self.start(keep_checkpoints=1)
        last, many = newest_state(folder), 10_000_000
        for path in folder.glob("0*"):
            path.rename(path.with_name(path.name.replace("0000009", str(many - 1))))
        numbered(folder, many, "adapters").write_bytes(b"weights")
        save_state(folder, many, last.arrays, last.info)
        (folder / "12ab_state.safetensors").write_text("not ours")
        (folder / "99999999_state.safetensors").mkdir()
        self.assertEqual(newest_state(folder).iteration, many)
        drop_newer(folder, many - 1)
        names = [path.name for path in folder.glob("*_state*")]
        kept = ("12ab", "99999999", "9999999")
        self.assertEqual(sorted(names), [f"{x}_state.safetensors" for x in kept])

    def test_a_state_of_another_version_is_no_damaged_one(self):
        folder = self.start()
        path = numbered(folder, STEPS, "state")
        arrays, metadata = mx.load(str(path), return_metadata=True)
        mx.save_safetensors(str(path), arrays, {**metadata, "version": "1"})
        with self.assertRaisesRegex(InputError, "of another version of mlx_lm.dpo"):
            newest_state(folder)

    def test_state_as_written(self):
        arrays = {
            "a": mx.array([1.5, float("nan")]),
            "b.c": mx.array(3, mx.uint64),
            "empty": mx.zeros((0, 2)),
            "d": mx.ones((2, 3), mx.bfloat16),
        }
        info = {"best": 0.1 + 0.2, "identity": {"train": "ä"}, "parts": {}}
        info |= {"pending": False, "updates": 5, "metrics_bytes": 0}
        numbered(self.folder, 5, "adapters").write_bytes(b"weights")
        state = load_state(save_state(self.folder, 5, arrays, info))
        lacking = [{k: x for k, x in info.items() if k != name} for name in info][1:]
        wrong = {**info, "identity": 5}, {**info, "updates": "5"}, [info]
        for strange in (*lacking, *wrong, {**info, "parts": {"window": 5}}):
            path = save_state(self.folder, 5, arrays, strange)
            with self.assertRaisesRegex(InputError, "is damaged|can't be read"):
                load_state(path)
        path = save_state(self.folder, 5, arrays, info)
        # What it goes on after is what is dropped behind.
        with self.assertRaisesRegex(InputError, "is damaged"):
            load_state(path.rename(self.folder / "0000007_state.safetensors"))
        self.assertIsInstance(state, TrainingState)
        self.assertEqual((state.iteration, state.info), (5, info))
        self.assertEqual(state.arrays.keys(), arrays.keys())
        for name, x in arrays.items():
            self.assertEqual(x.dtype, state.arrays[name].dtype)
            self.assertTrue(mx.array_equal(x, state.arrays[name], equal_nan=True))

    def test_parts_that_lack_what_they_need(self):
        folder = self.start()
        last = newest_state(folder)
        parts = last.info["parts"]
        for name in parts:
            without = {k: x for k, x in last.arrays.items() if not k.startswith(name)}
            emptied = {**last.info, "parts": {**parts, name: {}}}
            for arrays, info in ((without, last.info), (last.arrays, emptied)):
                save_state(folder, STEPS, arrays, info)
                with self.subTest(name, emptied=info is emptied):
                    with contextlib.suppress(InputError):
                        Setup(val_batches=1).start(folder, newest_state(folder))

    def test_damage_costs_one_checkpoint(self):
        whole = self.start(keep_checkpoints=2)
        expected = result(whole)

        def cut(path):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

        def older(path):
            shutil.copyfile(numbered(path.parent, STEPS - 1, "adapters"), path)

        damages = {
            "flipped": ("state", flip),
            "cut": ("state", cut),
            "empty": ("state", lambda path: path.write_bytes(b"")),
            "text": ("state", lambda path: path.write_text("{}")),
            "no weights": ("adapters", Path.unlink),
            "cut weights": ("adapters", cut),
            "flipped weights": ("adapters", flip),
            "older weights": ("adapters", older),
        }
        for name, (kind, damage) in damages.items():
            with self.subTest(name):
                broken = shutil.copytree(whole, self.folder / name)
                damage(numbered(broken, STEPS, kind))
                if kind == "adapters":
                    (broken / "adapters.safetensors").unlink()
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

    def test_the_best_by_another_measure(self):
        setup = Setup(save_best="accuracy", val_batches=-1, steps_per_eval=1)
        setup.start(self.folder, iters=4)
        setup.go_on(self.folder, save_best=None, iters=6)
        # What the folder holds is remembered meanwhile.
        held = newest_state(self.folder).info["parts"]["best"]
        self.assertEqual(held["measure"], "accuracy")
        setup.go_on(self.folder, save_best="loss", iters=9)
        lines = [x for x in lines_of(self.folder) if "val_loss" in x][-3:]
        best = min(lines, key=lambda line: line["val_loss"])
        step = numbered(self.folder, best["iteration"], "adapters")
        self.assertTrue(
            bits(self.folder / "best" / "adapters.safetensors") == bits(step)
        )


class TestReference(FolderCase):
    """It stays as long as a validation may ask it."""

    def test_more_validation_after_going_on(self):
        setup = Setup(other_reference=True, val_batches=1)
        setup.start(self.folder, iters=5)
        setup.go_on(self.folder, val_batches=-1)
        found = [x["val_pairs"] for x in lines_of(self.folder) if "val_pairs" in x]
        self.assertEqual((found[0], found[-1]), (2, 5))

    def test_a_number_that_is_not_finite(self):
        store, bad = ReferenceCache.store, pair_key(*random_pairs(5, seed=3)[0][:3])

        def spoil(cache, keys, logps):
            rows = [[math.nan] * 2 if k == bad else x for k, x in zip(keys, logps)]
            store(cache, keys, np.array(rows))

        with mock.patch.object(ReferenceCache, "store", spoil):
            Setup(other_reference=True, val_batches=-1).start(self.folder)
        self.assertEqual(lines_of(self.folder)[-1]["iteration"], STEPS)


if __name__ == "__main__":
    unittest.main()
