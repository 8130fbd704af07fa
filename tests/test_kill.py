# Copyright © 2026 MLX Contributors

import json
import os
import random
import shutil
import signal
import time
import unittest
from pathlib import Path
from typing import Any

from killing import EVENTS, Killer
from resuming import result
from test_dpo_command import CommandCase, write_yaml

# benchmarks/kill_test.py tries more of them.
MOMENTS = 6
SETTINGS = {
    **{"save_every": 2, "steps_per_eval": 3, "steps_per_report": 1, "val_batches": 2},
    **{"keep_checkpoints": 2, "save_best": "loss", "grad_accumulation_steps": 2},
    **{"lora_parameters": {"dropout": 0.2}, "lr_schedule": {"name": "linear"}},
}


class TestKill(CommandCase):
    """Killed at any moment, a run is gone on with as if nothing had been."""

    moments = MOMENTS
    seed = 0
    whole: Any = None
    counts: dict[str, int] = {}
    died: list = []

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.root = Path(cls.shared.name)
        cls.killer = Killer(cls.root)
        cls.addClassCleanup(cls.killer.close)
        cls.config = write_yaml(cls.root / "dpo.yaml", **SETTINGS)

    def setUp(self):
        super().setUp()
        self.random = random.Random(f"{self.id()} {self.seed}")
        if self.whole is None:
            self.whole = type(self).whole = self.root / "whole"
            self.assertEqual(self.killer.run(*self.start("whole")), 0, self.log())
            type(self).counts = json.loads((self.root / "counts.json").read_text())
        self.expected = result(self.whole)

    def log(self):
        return (self.root / "log.txt").read_text()

    def start(self, name):
        return self.flags(
            *("-c", self.config, "--iters", 8, "--batch-size", 2),
            *("--adapter-path", self.root / name),
            *("--reference-cache", self.root / f"{name} references"),
        )

    def moment(self):
        """A random one of those that the whole run had."""
        event = self.random.choice(EVENTS)
        return event, self.random.randint(1, self.counts[event])

    def check(self, name, *moments):
        """Kill a run at each of the moments in turn, then let it end."""
        folder = self.root / name
        codes = []
        for event, at in (*moments, (None, 0)):
            argv = ["--resume", folder]
            if not (folder / "adapter_config.json").exists():
                argv = self.start(name)
            timer = None
            if event == "time":
                timer, event = self.timer(at), None
            code = self.killer.run(*argv, event=event, at=at, timer=timer)
            codes.append(code)
            if code == -signal.SIGKILL:
                self.died.append(f"{name} was killed: {event or 'time'} {at:.3g}")
        self.assertEqual(code, 0, self.log())
        # A run that goes on may end before the moment comes, or before the time.
        self.assertLessEqual(set(codes), {0, -signal.SIGKILL}, self.log())
        if moments[0][0] in EVENTS:
            self.assertEqual(codes[0], -signal.SIGKILL)
        found = result(folder)
        for part in self.expected:
            self.assertTrue(found[part] == self.expected[part], part)
        for place in (folder, self.root / f"{name} references"):
            self.assertEqual([*place.rglob(".*.tmp*"), *place.rglob("*-journal")], [])
        for place in self.root.glob(f"{name}*"):
            shutil.rmtree(place)

    def timer(self, seconds):
        def wait_and_kill(child):
            time.sleep(seconds)
            # It waits to be collected: its number can't be another's.
            os.kill(child, signal.SIGKILL)

        return wait_and_kill

    def test_every_kind_of_moment_happens(self):
        self.assertEqual([e for e in EVENTS if self.counts[e] == 0], [])

    def test_killed_again_and_again(self):
        for i in range(self.moments):
            moments = [self.moment(), self.moment()]
            with self.subTest(moments=moments):
                self.check(f"run {i}", *moments)

    def test_killed_at_any_time(self):
        for i in range(max(1, self.moments // 4)):
            seconds = self.random.uniform(0, 1.5)
            with self.subTest(seconds=seconds):
                self.check(f"run {i}", ("time", seconds))


if __name__ == "__main__":
    unittest.main()
