# Copyright © 2026 MLX Contributors

"""Two runs in one folder: the second one ends with a line, and has touched nothing."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import unittest
from unittest import mock

from folders import FolderCase
from resuming import Setup, signals
from test_dpo_command import CommandCase, command

from mlx_lm.preference.errors import InputError
from mlx_lm.preference.files import HOST
from mlx_lm.preference.run.lock import folder_kept, keep_folder

DEAD = 4194999


@contextlib.contextmanager
def taken(folder):
    """Hold a folder's lock as another process does: its locks are its own file's."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, owner(123, "9" * 8).encode())
    try:
        yield
    finally:
        os.close(descriptor)


def owner(process, host):
    return json.dumps({"process": process, "name": "other.local", "host": host})


def content(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class TestCommand(CommandCase):
    def test_the_second_run_touches_nothing(self):
        self.succeed(*self.flags("--iters", 1))
        line = (
            rf"\AError: {self.adapters} is in use by another run, process 123 on "
            r"other.local: wait until it ends, or .* --adapter-path\.\n\Z"
        )
        with taken(self.adapters):
            before = content(self.adapters)
            for argv in (self.flags(), ["--resume", self.adapters]):
                code, _, err = command(*argv)
                self.assertEqual(code, 2)
                self.assertRegex(err, line)
                self.assertEqual(content(self.adapters), before)
            # These write no run.
            self.succeed(*self.flags("--dry-run"))
            self.succeed(*self.flags("--test", train=False))
        # Its process is dead: what it wrote there does not matter.
        self.succeed("--resume", self.adapters, "--iters", 2)
        self.assertFalse((self.adapters / ".lock").exists())

    def test_two_that_begin_at_the_same_time(self):
        # The folder is made by the other one after this one has looked.
        find = mock.Mock()
        with contextlib.ExitStack() as stack:
            find.side_effect = lambda *args: (
                self.adapters.mkdir(),
                stack.enter_context(taken(self.adapters)),
            )
            with mock.patch("mlx_lm.dpo.check_folder", find):
                code, _, err = command(*self.flags())
        self.assertEqual(code, 2)
        self.assertIn("is in use by another run", err)
        self.assertEqual([p.name for p in self.adapters.iterdir()], [".lock"])


class TestLock(FolderCase):
    def setUp(self):
        super().setUp()
        self.lock = self.folder / ".lock"

    def test_held_inside_and_gone_behind(self):
        with folder_kept(self.folder):
            with folder_kept(self.folder):
                self.assertEqual(json.loads(self.lock.read_text())["host"], HOST)
            with open(self.lock) as file, self.assertRaises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.assertFalse(self.lock.exists())
        # Nobody asked for it.
        keep_folder(self.folder)
        self.assertFalse(self.lock.exists())

    def test_train_dpo_keeps_it_too(self):
        with taken(self.folder), self.assertRaisesRegex(
            InputError, "in use by another"
        ):
            Setup().start(self.folder)
        with self.assertRaises(SystemExit), signals("_take_step", 1):
            Setup().start(self.folder)
        self.assertFalse(self.lock.exists())

    def test_a_lock_that_its_owner_deleted_meanwhile(self):
        flock, calls = fcntl.flock, []

        def late(*args):
            calls.append(args)
            if len(calls) == 1:
                self.lock.unlink()
            flock(*args)

        with mock.patch.object(fcntl, "flock", late), folder_kept(self.folder):
            self.assertTrue(self.lock.exists())
        self.assertEqual(len(calls), 2)

    def test_file_systems_without_locks(self):
        here, dead = os.getppid(), DEAD
        cases = {
            "nobody": ("", None),
            "dead": (owner(dead, HOST), None),
            "alive": (owner(here, HOST), r"process \d+ on .*--adapter-path\.$"),
            "elsewhere": (
                owner(dead, "0" * 8),
                r"If it is dead, delete .lock there\.$",
            ),
            "half written": (owner(here, HOST)[:-9], None),
            "odd numbers": (owner(10**30, HOST), None),
        }
        for name, (text, refused) in cases.items():
            self.lock.write_text(text)
            error = OSError(errno.ENOTSUP, "Operation not supported")
            with self.subTest(name), mock.patch.object(
                fcntl, "flock", side_effect=error
            ):
                if refused is None:
                    with folder_kept(self.folder):
                        pass
                    self.assertFalse(self.lock.exists())
                    continue
                with self.assertRaisesRegex(InputError, refused):
                    with folder_kept(self.folder):
                        pass
                self.assertEqual(self.lock.read_text(), text)

    def test_what_is_no_lock_is_refused(self):
        target = self.folder / "target"
        target.write_text("precious")
        makers = {
            "link": lambda: self.lock.symlink_to(target),
            "dangling link": lambda: self.lock.symlink_to(self.folder / "nowhere"),
            "FIFO": lambda: os.mkfifo(self.lock),
            "folder": self.lock.mkdir,
        }
        for name, make in makers.items():
            with self.subTest(name):
                make()
                with self.assertRaisesRegex(InputError, r"Can't write .*/\.lock: "):
                    with folder_kept(self.folder):
                        pass
                self.assertEqual(target.read_text(), "precious")
                self.assertFalse((self.folder / "nowhere").exists())
                self.lock.rmdir() if name == "folder" else self.lock.unlink()

    def test_somebody_elses_file_in_a_shared_folder(self):
        self.lock.write_text("")
        original = os.open

        def forbidden(path, flags, *args):
            if flags & os.O_RDWR and str(path).endswith(".lock"):
                raise PermissionError(errno.EACCES, "Permission denied")
            return original(path, flags, *args)

        with mock.patch.object(os, "open", forbidden), folder_kept(self.folder):
            with open(self.lock) as file, self.assertRaises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_a_folder_that_went_away(self):
        folder = self.folder / "run"
        folder.mkdir()
        with folder_kept(folder):
            shutil.rmtree(folder)


if __name__ == "__main__":
    unittest.main()
