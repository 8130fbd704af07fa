# Copyright © 2026 MLX Contributors

import builtins
import contextlib
import errno
import io
import os
import resource
import shutil
import stat
import unittest
from unittest import mock

import mlx.core as mx
from folders import FolderCase
from resuming import Setup, result
from test_dpo_command import CommandCase, command

from mlx_lm.preference.errors import InputError
from mlx_lm.preference.run.checkpoint import newest_state
from mlx_lm.tuner import callbacks

FULL = OSError(errno.ENOSPC, "No space left on device")
LINE = r"\AError: Can't write .*: .*If the disk is full, make room.*--resume\.\n\Z"


class Disk:
    """Counts what is written; from the given write on it is full."""

    def __init__(self, room=10**9):
        self.room, self.writes = room, 0
        self.save, self.replace, self.sync = mx.save_safetensors, os.replace, os.fsync

    def _write(self):
        self.writes += 1
        return self.writes <= self.room

    def save_safetensors(self, name, *args):
        self.save(name, *args)
        if not self._write():
            os.truncate(name, os.path.getsize(name) // 2)
            raise RuntimeError("[write] Unable to write 99 bytes to file.")

    def rename(self, *args):
        if not self._write():
            raise FULL
        self.replace(*args)

    def fsync(self, file):
        # A folder is synced where the system can.
        if not stat.S_ISDIR(os.fstat(file).st_mode) and not self._write():
            raise FULL
        self.sync(file)

    def open(self, name, mode="r"):
        if "a" in mode and not self._write():
            # Half a line got through.
            with builtins.open(name, mode) as file:
                file.write(b'{"itera' if "b" in mode else '{"itera')
            raise FULL
        return builtins.open(name, mode)

    @contextlib.contextmanager
    def in_use(self):
        with (
            mock.patch.object(mx, "save_safetensors", self.save_safetensors),
            mock.patch.object(os, "replace", self.rename),
            mock.patch.object(os, "fsync", self.fsync),
            mock.patch.object(callbacks, "open", self.open, create=True),
        ):
            yield self


class TestEveryWrite(FolderCase):
    """A disk that is full from some write on, for every write of a run."""

    def test_the_last_good_checkpoint_stays(self):
        setup = Setup(
            **{"iters": 3, "steps_per_save": 1, "keep_checkpoints": 1},
            **{"val_batches": 1, "save_best": "loss", "steps_per_eval": 2},
        )
        with Disk().in_use() as disk:
            setup.start(self.folder / "whole")
        expected = result(self.folder / "whole")
        self.assertGreater(disk.writes, 30)
        saved = set()
        for room in range(disk.writes):
            folder = self.folder / "run"
            with self.subTest(room=room):
                with Disk(room).in_use(), self.assertRaises(InputError) as caught:
                    setup.start(folder)
                self.assertRegex(f"Error: {caught.exception}\n", LINE)
                self.assertEqual([*folder.rglob(".*")], [])
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    state = newest_state(folder)
                # Nothing is damaged.
                self.assertEqual(out.getvalue(), "")
                saved.add(state and state.iteration)
                setup.start(folder, state)
                self.assertTrue(result(folder) == expected)
            shutil.rmtree(folder, ignore_errors=True)
        self.assertLessEqual({None, 1, 2}, saved)


class TestCommand(CommandCase):
    def check(self):
        code, _, err = command(*self.more)
        self.assertIn(code, (1, 2))
        self.assertRegex(err, LINE)

    def setUp(self):
        super().setUp()
        self.more = self.flags("--iters", 4, "--save-every", 2, "--batch-size", 2)

    def test_one_line(self):
        with Disk().in_use() as disk:
            self.succeed(*self.more, "--adapter-path", self.folder / "whole")
        expected = result(self.folder / "whole")
        for share in (0.0, 0.1, 0.5, 0.9):
            shutil.rmtree(self.adapters, ignore_errors=True)
            with self.subTest(share=share):
                with Disk(int(share * disk.writes)).in_use():
                    self.check()
                if share:
                    self.succeed("--resume", self.adapters)
                    self.assertTrue(result(self.adapters) == expected)

    def test_a_limit_of_the_system(self):
        self.succeed(*self.more)
        expected = result(self.adapters)
        # Room for adapters, not for a state.
        size = max(map(os.path.getsize, self.adapters.glob("*_state.*"))) - 100
        shutil.rmtree(self.adapters)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            self.check()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        self.assertEqual([*self.adapters.rglob(".*")], [])
        self.succeed("--resume", self.adapters)
        self.assertTrue(result(self.adapters) == expected)


if __name__ == "__main__":
    unittest.main()
