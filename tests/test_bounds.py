# Copyright © 2026 MLX Contributors

"""Files that never end, or that hold far more than their size: one line each."""

import gzip
import io
import os
import tempfile
import unittest
from functools import partial
from pathlib import Path
from unittest import mock

import mlx.core as mx
import pyarrow
from bad_inputs import GOOD, Desk, lines
from pyarrow import ipc, parquet
from test_bad_input import CommandCase

from mlx_lm.preference import files
from mlx_lm.preference.data import parsing, tokenize
from mlx_lm.preference.data.arrow import unpacked_bytes
from mlx_lm.preference.device import system_memory

ROOM = 2 * 10**6


def fifo(d, name="pipe"):
    os.mkfifo(d.folder / name)
    return d.folder / name


def others(path):
    os.mkfifo(path)
    return ()


def of_model(d):
    copy = d.copy_of_model("config.json")
    os.mkfifo(copy / "config.json")
    return ["--model", copy]


def sparse(d, name, size=2 * 10**8):
    path = d.file(b"", name)
    with open(path, "r+b") as file:
        file.truncate(size)
    return path


def bomb(write, same):
    """A table that says one long text in each of its rows, and stores it once."""
    short = ["a"] * 500
    rows = pyarrow.table({"prompt": short, "chosen": same, "rejected": short})
    buffer = io.BytesIO()
    write(rows, buffer)
    return buffer.getvalue()


def as_arrow(rows, buffer, new=ipc.new_file, packed=None):
    options = ipc.IpcWriteOptions(compression=packed)
    with new(buffer, rows.schema, options=options) as writer:
        writer.write_table(rows)


def packed_bomb(d, kind, new, same=None):
    """Arrays that are small as long as nobody unpacks them."""
    write = partial(as_arrow, new=new, packed=kind)
    return d.train(bomb(write, same or [LONG] * 500), "train.arrow")


def saved_bomb(d):
    d.file('{"_data_files": [{"filename": "f.arrow"}]}', "state.json")
    return d.train(gzip.compress(bytes(10**8)), "f.arrow")


LONG = "x" * 10**5
WIDE = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 500), [LONG * 100])
SAME = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 500), [LONG])


FULL = "holds more than 0.002 GB, a quarter of the free memory: split it"
# The flags, and what the line must say.
FILES = {
    "settings from a FIFO": (lambda d: ["-c", fifo(d)], "pipe: It is no regular file"),
    "settings from a device": (["-c", "/dev/zero"], "/dev/zero: It is no regular"),
    "large settings": (lambda d: ["-c", sparse(d, "a.yaml")], "more than 1 MB"),
    "settings that repeat themselves": (
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(
            f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n"
            for x, y in zip("abcdefg", "bcdefgh")
        ),
        "more than 100,000 values",
    ),
    "settings that hold themselves": ("hf_dataset: &a [*a]", "100,000 values"),
    "prompts from a FIFO": (lambda d: ["--sample-prompts", fifo(d)], "no regular file"),
    "prompts from a device": (["--sample-prompts", "/dev/zero"], "no regular file"),
    "large prompts": (
        lambda d: ["--sample-prompts", sparse(d, "p.txt")],
        "p.txt can't be read: It has more than 64 MB",
    ),
    "text from a FIFO": (lambda d: ["--retain-data", fifo(d)], "no regular file"),
    "text from a device": (["--retain-data", "/dev/zero"], "no regular file"),
    "large text": (lambda d: ["--retain-data", sparse(d, "t.txt")], "more than 64 MB"),
    "data from a FIFO": (lambda d: ["--data", fifo(d)], "Found no split in .*pipe"),
    "data from a device": (["--data", "/dev/zero"], "Found no split in /dev/zero"),
    "FIFO among saved data": (
        lambda d: [
            "--data",
            d.file('{"_data_files": [{"filename": "f.arrow"}]}', "state.json").parent,
            *others(d.folder / "other" / "f.arrow"),
        ],
        "Can't read .*f.arrow: It is no regular file",
    ),
    "large data": (lambda d: ["--data", sparse(d, "train.jsonl")], FULL),
    "a gzip bomb": (
        lambda d: d.train(gzip.compress(bytes(10**8)), "train.json.gz"),
        FULL,
    ),
    "many short rows": (lambda d: d.train(b"{}\n" * 20_000), FULL),
    "a Parquet bomb": (
        lambda d: d.train(bomb(parquet.write_table, [LONG] * 500), "train.parquet"),
        FULL,
    ),
    "an Arrow bomb": (lambda d: d.train(bomb(as_arrow, SAME), "train.arrow"), FULL),
    "a packed Arrow file": (lambda d: packed_bomb(d, "zstd", ipc.new_file), FULL),
    "a packed Arrow stream": (lambda d: packed_bomb(d, "lz4", ipc.new_stream), FULL),
    "a packed dictionary": (lambda d: packed_bomb(d, "zstd", ipc.new_file, WIDE), FULL),
    "a gzip bomb in a saved set": (saved_bomb, FULL),
    "a model's FIFO": (of_model, "config.json is no regular file"),
    "an adapter's FIFO": (
        lambda d: ["--resume-adapter-file", fifo(d)],
        "adapter file .*pipe does not exist, or is no file",
    ),
}


@unittest.skipUnless(hasattr(os, "mkfifo"), "there are no FIFOs here")
class TestFiles(CommandCase):
    def test_files_that_never_end_or_grow(self):
        # Enough for the rows of good data, and not for those of bad.
        free = mock.Mock(return_value=4 * ROOM)
        with mock.patch.object(parsing, "system_memory", free):
            for number, (name, (fault, pattern)) in enumerate(FILES.items()):
                desk = Desk(self.folder / str(number))
                with self.subTest(name):
                    self.check(desk, desk.run(*desk.given(fault)), pattern)

    def test_no_memory_left(self):
        desk = Desk(self.folder / "desk")
        with mock.patch.object(
            parsing, "_parse_json", mock.Mock(side_effect=MemoryError)
        ):
            result = desk.run()
        self.check(desk, result, "train.jsonl does not fit into the memory. Split it")

    def test_long_rows(self):
        """They are left out with their place, before anything is made of them."""
        desk = Desk(self.folder / "desk")
        long = {**GOOD[0], "chosen": "a b " * 2**19}
        deep = {**GOOD[0], "rejected": [{"role": "x", "content": ["y" * 10**6] * 3}]}
        flags = desk.train(lines(*GOOD * 3, long, deep))
        result = desk.run(*flags, "--dry-run")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        said = " ".join(result.stdout.split())
        self.assertIn(
            "2 rows: longer than 2,000,000 characters (first: train.jsonl:25)", said
        )

    def test_long_rows_are_tokenized_alone(self):
        rows = [(i, {"a": "x" * size}) for i, size in enumerate([3, 9, 2, 8, 8, 1])]
        with mock.patch.object(tokenize, "MOST_CHARACTERS", 10):
            sizes = [len(chunk) for chunk in tokenize._chunks(iter(rows))]
        self.assertEqual(sizes, [2, 3, 1])


class TestParts(unittest.TestCase):
    def test_what_an_arrow_file_holds_is_known_unpacked(self):
        rows = pyarrow.table({"a": ["x" * 1000] * 99, "b": [[1], None, [2, 3]] * 33})
        for new in (ipc.new_file, ipc.new_stream):
            for packed in (None, "lz4", "zstd"):
                with self.subTest(new=new.__name__, packed=packed):
                    buffer = io.BytesIO()
                    as_arrow(rows, buffer, new, packed)
                    raw, size = buffer.getvalue(), rows.nbytes if packed else 0
                    self.assertLess(abs(unpacked_bytes(raw) - size), 100)
                    with mock.patch.object(ipc, "open_file") as file:
                        with mock.patch.object(ipc, "open_stream") as stream:
                            for end in range(0, len(raw), 97):
                                unpacked_bytes(raw[:end])
                    self.assertFalse(file.called or stream.called)

    def test_reading(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a"
            path.write_bytes(b"abc")
            self.assertEqual(files.read_plain(path, 3), b"abc")
            with self.assertRaisesRegex(OSError, "more than 0 MB"):
                files.read_plain(path, 2)
            with self.assertRaises(IsADirectoryError):
                files.read_plain(folder)
            with self.assertRaises(FileNotFoundError):
                files.read_plain(f"{folder}/b")

    def test_free_memory_is_not_read_for_every_part(self):
        free = mock.Mock(return_value=10**9)
        with mock.patch.object(parsing, "system_memory", free):
            for _ in range(1000):
                parsing.check_room(Path("a"), 10)
        self.assertLess(free.call_count, 10)

    def test_limits_of_a_process(self):
        with tempfile.TemporaryDirectory() as folder:
            proc = Path(folder) / "proc"
            (proc / "self").mkdir(parents=True)
            (proc / "meminfo").write_text("MemAvailable: 9000 kB\n")
            (proc / "self/status").write_text("VmSize:  1000 kB\nVmData: 500 kB\n")
            for space, data, free in (
                *(("unlimited", "unlimited", 9000), ("3072000", "unlimited", 2000)),
                *(("9999999999", "1024000", 500), ("1024", "1024", 0)),
            ):
                text = f"Max data size  {data}  unlimited  bytes\n"
                text += f"Max address space  {space}  unlimited  bytes\n"
                (proc / "self/limits").write_text(text)
                held = mx.get_active_memory() + mx.get_cache_memory()
                self.assertEqual(system_memory(Path(folder)) - held, free * 1024)


if __name__ == "__main__":
    unittest.main()
