# Copyright © 2026 MLX Contributors

import json
import math
import os
import tempfile
import time
import unittest
from pathlib import Path

from mlx_lm.preference.files import (
    DAY,
    HOST,
    json_text,
    remove_leftovers,
    replace_file,
    write_json,
)


class TestFiles(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

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

    def test_numbers_that_json_does_not_know_are_null(self):
        content = {"a": math.nan, "b": [1.5, (math.inf, 2)], "c": {"d": -math.inf}}
        expected = {"a": None, "b": [1.5, [None, 2]], "c": {"d": None}}
        write_json(self.folder / "x.json", content, indent=1)
        for text in (json_text(content), (self.folder / "x.json").read_text()):
            self.assertEqual(json.loads(text, parse_constant=self.fail), expected)

    def test_leftovers(self):
        day_ago = time.time() - DAY - 9
        gone, alive, other = 4194999, os.getppid(), "0" * 8
        files = {
            f".0000009_state.{HOST}-{gone}.tmp.safetensors": True,
            f".x.{HOST}-{os.getpid()}.tmp.json": True,
            # Of processes that may be writing.
            f".y.{HOST}-{alive}.tmp.json": False,
            f".z.{other}-{gone}.tmp.json": False,
            f".older.{gone}.tmp.json": False,
            "x.1.tmp.json": False,
            ".no.tmp.json": False,
        }
        for name in files:
            (self.folder / name).write_text("half")
        remove_leftovers(self.folder)
        kept = {path.name for path in self.folder.iterdir()}
        self.assertEqual(kept, {name for name, goes in files.items() if not goes})
        for name in kept:
            os.utime(self.folder / name, (day_ago, day_ago))
        remove_leftovers(self.folder)
        kept = {path.name for path in self.folder.iterdir()}
        self.assertEqual(kept, {"x.1.tmp.json", ".no.tmp.json"})


if __name__ == "__main__":
    unittest.main()
