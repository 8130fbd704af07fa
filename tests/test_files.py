# Copyright © 2026 MLX Contributors

import json
import math
import os
import re
import time
import unittest
from pathlib import Path
from unittest import mock

from folders import FolderCase

from mlx_lm.preference import files
from mlx_lm.preference.collect import prompts as collected
from mlx_lm.preference.errors import InputError
from mlx_lm.preference.files import (
    DAY,
    HOST,
    json_text,
    remove_leftovers,
    replace_file,
    write_json,
)
from mlx_lm.preference.watch import retained_text, samples
from mlx_lm.preference.watch.texts import read_lines_of


class TestFiles(FolderCase):
    def test_the_old_file_stays_if_writing_fails(self):
        path = self.folder / "numbers.bin"
        replace_file(path, lambda name: Path(name).write_bytes(b"old"))

        def fail(name):
            Path(name).write_bytes(b"ne")
            raise OSError("full")

        with self.assertRaisesRegex(OSError, "full"):
            replace_file(path, fail)
        self.assertEqual(path.read_bytes(), b"old")
        self.assertEqual(list(self.folder.iterdir()), [path])

    def test_what_lies_in_the_way_is_not_written_to(self):
        target = self.folder / "target"
        target.write_text("precious")
        path = self.folder / "x.json"
        makers = {
            "link": lambda where: where.symlink_to(target),
            "hard link": lambda where: where.hardlink_to(target),
            "FIFO": os.mkfifo,
        }
        for name, make in makers.items():
            with self.subTest(name):
                make(self.folder / f".x.{HOST}-{os.getpid()}.tmp.json")
                write_json(path, name)
                self.assertEqual(json.loads(path.read_text()), name)
                self.assertEqual(target.read_text(), "precious")
                self.assertEqual(
                    {p.name for p in self.folder.iterdir()}, {"target", "x.json"}
                )

    def test_devices_are_not_replaced(self):
        path = self.folder / "pipe"
        os.mkfifo(path)
        with self.assertRaisesRegex(OSError, "no regular file"):
            replace_file(path, lambda name: Path(name).write_bytes(b"new"))
        self.assertTrue(path.is_fifo())

    def test_numbers_of_processes_are_those_of_a_host(self):
        def named(node, boot, space):
            with (
                mock.patch("platform.node", return_value=node),
                mock.patch.object(Path, "read_text", return_value=boot),
                mock.patch("os.readlink", return_value=space),
            ):
                return files._host()

        names = {
            named(*one)
            for one in (
                ("mac.local", "1", "pid:[1]"),
                # Two hosts, or two containers, may have one name.
                ("mac.local", "2", "pid:[1]"),
                ("mac.local", "1", "pid:[2]"),
                ("linux", "1", "pid:[1]"),
            )
        }
        self.assertEqual(len(names), 4)
        with mock.patch.object(Path, "read_text", side_effect=FileNotFoundError):
            self.assertRegex(files._host(), "^[0-9a-f]{8}$")
        self.assertEqual(files._host(), HOST)

    def test_numbers_that_json_does_not_know_are_null(self):
        content = {"a": math.nan, "b": [1.5, (math.inf, 2)], "c": {"d": -math.inf}}
        expected = {"a": None, "b": [1.5, [None, 2]], "c": {"d": None}}
        write_json(self.folder / "x.json", content, indent=1)
        for text in (json_text(content), (self.folder / "x.json").read_text()):
            self.assertEqual(json.loads(text, parse_constant=self.fail), expected)

    def test_texts_of_users(self):
        """One reader, and one wording, whatever setting names the file."""
        path, advice = self.folder / "a.txt", "Give a text."
        lines = [(1, "a\u2028b"), (3, "ä")]
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            path.write_bytes("a\u2028b\r\n \r\nä\r\n".encode(encoding))
            self.assertEqual(read_lines_of(path, "prompts", advice), lines)
        readers = {
            "prompts": collected.read_prompts,
            "sample_prompts": samples.read_prompts,
            "retain_data": retained_text.read_text,
        }
        for content in (b"\xff\xfd", b"a\0b", b"\xff\xfea"):
            path.write_bytes(content)
            for name, read in readers.items():
                with self.subTest(name, content=content):
                    wording = f"{name} {path} can't be read: it is not UTF-8 text. Give"
                    with self.assertRaisesRegex(InputError, re.escape(wording)):
                        read(str(path))

    def test_leftovers(self):
        day_ago = time.time() - DAY - 9
        gone, alive, other = 4194999, os.getppid(), "0" * 8
        names = {
            f".0000009_state.{HOST}-{gone}.tmp.safetensors": True,
            f".x.{HOST}-{os.getpid()}.tmp.json": True,
            # Of processes that may be writing.
            f".y.{HOST}-{alive}.tmp.json": False,
            f".z.{other}-{gone}.tmp.json": False,
            f".older.{gone}.tmp.json": False,
            "x.1.tmp.json": False,
            ".no.tmp.json": False,
            # No process has such a number.
            f".w.{HOST}-{10**30}.tmp.json": True,
        }
        for name in names:
            (self.folder / name).write_text("half")
        remove_leftovers(self.folder)
        kept = {path.name for path in self.folder.iterdir()}
        self.assertEqual(kept, {name for name, goes in names.items() if not goes})
        for name in kept:
            os.utime(self.folder / name, (day_ago, day_ago))
        remove_leftovers(self.folder)
        kept = {path.name for path in self.folder.iterdir()}
        self.assertEqual(kept, {"x.1.tmp.json", ".no.tmp.json"})


if __name__ == "__main__":
    unittest.main()
