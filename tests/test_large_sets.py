# Copyright © 2026 MLX Contributors

"""Sets that do not fit into the memory: as many rows of them are read as a run uses."""

import gzip
import json
import shutil
import unittest
from unittest import mock

import datasets as hf
import numpy as np
import pyarrow
from pyarrow import ipc, parquet
from test_dpo_command import CommandCase, command
from test_preference_files import TempFolder, first_ids, lines, make_rows

from mlx_lm.preference.data import hub, large, parsing
from mlx_lm.preference.data.sample import draw
from mlx_lm.preference.data.sources import FileRows
from mlx_lm.preference.errors import InputError
from mlx_lm.preference.settings import datasets as named
from mlx_lm.tuner.datasets import PreferenceDataset

# Rows of different lengths, some across several blocks, with letters of two bytes.
ROWS = [
    {"prompt": f"w{i}", "chosen": " é" * (i * 7 % 40 + 1), "rejected": " b" * (i % 5)}
    for i in range(190)
]


def save_kinds(folder):
    """The rows as each kind of file that can be read in part."""
    table, dump = pyarrow.Table.from_pylist(ROWS), json.dumps
    text = "\ufeff" + "".join(
        dump(row, ensure_ascii=i % 2 > 0) + ("\n", "\r\n", "\n\n \n")[i % 3]
        for i, row in enumerate(ROWS)
    )
    # Rows that can't be read are rows, the last line has no end.
    text = text.replace("}", "", 1).replace('"w11"', '"\udcff"') + '{"prompt": "x"}'
    raw = text.encode("utf-8", "surrogateescape")
    (folder / "a.jsonl").write_bytes(raw.replace(b"\r", b"", 1)[raw.index(b"\n") + 1 :])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(raw[raw.index(b"\n") + 1 :]))
    parquet.write_table(table, folder / "c.parquet", row_group_size=33)
    with ipc.new_file(str(folder / "d.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=17)
    with ipc.new_stream(str(folder / "e.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=17)
    return sorted(folder.iterdir())


def told(row):
    return row if isinstance(row, dict) else (row.reason, row.detail)


class TestPartsOfFiles(TempFolder):
    def test_rows_and_places_are_those_of_the_whole(self):
        paths = save_kinds(self.folder)
        self.enterContext(mock.patch.object(large, "PART", 10))
        for given in (*([path] for path in paths), paths):
            whole = FileRows(given)
            rows = {whole.location(i): told(whole[i]) for i in range(len(whole))}
            for block in (7, 64, 10**6):
                self.enterContext(mock.patch.object(large, "BLOCK", block))
                part = large.PartsOfFiles(FileRows(given)).some()
                for count in (1, 20, len(part)):
                    with self.subTest(files=len(given), block=block, count=count):
                        numbers = draw(len(part), count, seed=block)
                        found = part.take(numbers)
                        expected = {place: rows[place] for _, place in found}
                        self.assertEqual(
                            {place: told(row) for row, place in found}, expected
                        )
                # All, in their order, but for blank lines.
                self.assertEqual([place for _, place in found], list(rows))

    def test_a_row_that_never_ends_is_cut(self):
        path = self.write("a.jsonl", lines(make_rows(0, 1)) + "x" * 1000 + "\n{}")
        for name, value in (("BLOCK", 8), ("_LONGEST", 64)):
            self.enterContext(mock.patch.object(large, name, value))
        part = large.PartsOfFiles(FileRows([path])).some()
        (first, _), (second, place), (third, _) = part.take(np.arange(3))
        self.assertEqual((first, third), (make_rows(0, 1)[0], {}))
        self.assertEqual((second.reason, place), ("unreadable JSON", "a.jsonl:2"))

    def test_packed_arrays_are_not_unpacked(self):
        """Nobody knows how many bytes a few of them stand for, until all are there."""
        table = pyarrow.Table.from_pylist(ROWS)
        packed = ipc.IpcWriteOptions(compression="zstd")
        for write in (ipc.new_file, ipc.new_stream):
            path = self.folder / "a.arrow"
            with write(str(path), table.schema, options=packed) as writer:
                writer.write_table(table)
            self.assertIsNone(large.open_large(path))

    def test_numbers_that_are_drawn(self):
        for total, count in ((5, 9), (9, 9), (40, 30), (1000, 20), (10**12, 50)):
            numbers = draw(total, count, seed=3)
            self.assertEqual(len(numbers), min(total, count))
            self.assertTrue((np.diff(numbers) > 0).all())
            self.assertTrue(0 <= numbers[0] and numbers[-1] < total)
            self.assertEqual(numbers.tolist(), draw(total, count, 3).tolist())
        # A run that goes on with another version needs the same.
        self.assertEqual(draw(1000, 4, 0).tolist(), [210, 262, 471, 956])
        self.assertEqual(draw(10, 4, 0).tolist(), [0, 4, 8, 9])
        for total, count in ((50, 5), (50, 20)):
            hits = np.bincount(
                np.concatenate([draw(total, count, s) for s in range(2000)]),
                minlength=total,
            )
            # Within five standard deviations of a fair choice.
            share = count / total
            spread = np.sqrt(2000 * share * (1 - share))
            self.assertLess(np.abs(hits - 2000 * share).max(), 5 * spread)


class TestSamples(TempFolder):
    def setUp(self):
        super().setUp()
        self.write("train.jsonl", lines(make_rows(0, 150)))
        self.set_room(3000)

    def set_room(self, most):
        self.enterContext(mock.patch.object(parsing, "system_memory", lambda: 4 * most))
        parsing._free.cache_clear()
        self.addCleanup(parsing._free.cache_clear)

    def test_ids_are_those_of_the_rows_alone(self):
        (train, valid, _), out = self.load(enough_rows=30, seed=5)
        self.assertIn("Reading 30 of 150 training rows, chosen at random (seed 5)", out)
        self.assertEqual(train.sample, (30, 30, 150))
        numbers = draw(150, 30, 5)
        rows = [make_rows(0, 150)[i] for i in numbers]
        alone, held = PreferenceDataset(rows, train.tokenizer).hold_out(0.02, 5)
        for ours, theirs in ((train, alone), (valid, held)):
            self.assertEqual(list(ours.id_bytes()), list(theirs.id_bytes()))
            self.assertEqual(
                [ours.source_row(i) for i in range(len(ours))],
                [
                    f"train.jsonl:{numbers[theirs.source_row(i)] + 1}"
                    for i in range(len(ours))
                ],
            )

    def test_what_fits_is_read_as_ever(self):
        self.set_room(10**6)
        (whole, *_), out = self.load(enough_rows=30)
        self.assertEqual((len(whole), whole.sample), (147, None))
        self.assertNotIn("Reading", out)
        # And in part if that is asked for, by the same choice.
        (part, *_), _ = self.load(max_rows=30, valid_fraction=0)
        self.set_room(3000)
        (other, *_), _ = self.load(max_rows=30, valid_fraction=0)
        self.assertEqual(first_ids(part), first_ids(other))
        self.assertEqual(first_ids(part), draw(150, 30, 0).tolist())
        self.set_room(10**6)
        (all_of, *_), _ = self.load(max_rows=200, valid_fraction=0)
        self.assertEqual((len(all_of), all_of.sample), (150, (200, 150, 150)))

    def test_several_sets_are_one(self):
        self.write("other/train.jsonl", lines(make_rows(150, 40)))
        table = hf.Dataset.from_list(make_rows(0, 150))
        found = {"a/b": {"train": table}, "c/d": {"train": table.select(range(40))}}
        load = lambda name, kwargs: found[name]
        self.enterContext(mock.patch.object(hub, "_load_hub", load))
        both = [{"path": "a/b"}, {"path": "c/d"}]
        (train, *_), out = self.load(data=both, enough_rows=60, valid_fraction=0)
        self.assertEqual(train.sample, (60, 60, 190))
        numbers = draw(190, 60, 0)
        self.assertEqual(first_ids(train), [n if n < 150 else n - 150 for n in numbers])
        self.assertEqual(train.source_row(0), f"a/b[train]:{numbers[0] + 1}")
        # A share of none is left out.
        (train, *_), _ = self.load(data=both, max_rows=1, valid_fraction=0)
        self.assertEqual(len(train), 1)

    def test_what_is_refused(self):
        ratings = [
            {"prompt": "w1", "response": f" w{i}", "helpfulness": i % 5}
            for i in range(99)
        ]
        table = "prompt,chosen,rejected\n" + "w1,w2,w3\n" * 600
        pretty = "\n".join(json.dumps(row, indent=1) for row in make_rows(0, 50))
        for name, content, pattern in (
            ("train.jsonl", lines(ratings), "answers to one prompt .* in several rows"),
            ("train.json", json.dumps(make_rows(0, 99)), "make it JSONL, a row a line"),
            (
                "train.json",
                pretty,
                "3e-06 GB, a quarter of .*: split it, or make it JSONL",
            ),
            (
                "train.csv",
                table,
                "split it, or make it JSONL, a row a line, or Parquet",
            ),
            ("train.jsonl", lines(make_rows(0, 900)), "30 of 900 .*: set fewer iters"),
        ):
            with self.subTest(pattern):
                shutil.rmtree(self.folder)
                self.folder.mkdir()
                self.write(name, content)
                self.set_room(1000 if "fewer" in pattern else 3000)
                with self.assertRaisesRegex(InputError, pattern):
                    self.load(enough_rows=30)
        with self.assertRaisesRegex(InputError, "part of it, which max_rows takes"):
            self.load()


class TestRuns(CommandCase):
    """The command, on a set that does not fit."""

    def setUp(self):
        super().setUp()
        rows = [
            {
                "prompt": f"Say {i}.",
                "chosen": f" {i} {i}",
                "rejected": " no" * (i % 4 + 1),
            }
            for i in range(200)
        ]
        self.data = self.folder / "large"
        self.data.mkdir()
        # Blank lines count among all, whatever the memory.
        text = lines(rows[:100]) + "\n" + lines(rows[100:])
        (self.data / "train.jsonl").write_text(text)
        self.alone = self.folder / "alone"
        self.alone.mkdir()
        chosen = [rows[i - (i > 100)] for i in draw(201, 40, 0) if i != 100]
        (self.alone / "train.jsonl").write_text(lines(chosen))
        self.enterContext(mock.patch.object(named, "FEWEST_ROWS", 40))
        self.enterContext(mock.patch.object(named, "HELD_OUT", 2))
        self.addCleanup(parsing._free.cache_clear)

    def small(self):
        parsing._free.cache_clear()
        return mock.patch.object(parsing, "system_memory", lambda: 4 * 9000)

    def test_a_run_goes_on_with_the_rows_of_its_start(self):
        plain, parts = self.folder / "plain", self.folder / "parts"
        weights = lambda folder: (folder / "adapters.safetensors").read_bytes()
        more = ("--save-every", 1, "--no-reference-cache")
        alone = ("--data", self.alone, "--adapter-path", plain, "--iters", 12)
        self.succeed(*self.flags(*more, *alone))
        with self.small():
            out = self.succeed(*self.flags(*more, "--adapter-path", parts))
        self.assertIn("rows read       40 of 201", " ".join(out.split("\n")))
        config = json.loads((parts / "adapter_config.json").read_text())
        self.assertEqual(config["max_rows"], 40)
        parsing._free.cache_clear()
        # Longer than what would have read more, and with memory for all.
        self.succeed("--resume", parts, "--iters", 12)
        self.assertEqual(weights(parts), weights(plain))
        code, _, err = command("--resume", parts, "--iters", 13, "--max-rows", 50)
        self.assertEqual(code, 2)
        self.assertIn("max_rows is 50, but the run", err)

    def test_longer_runs_read_more(self):
        with self.small():
            self.succeed(*self.flags("--iters", 20, "--dry-run"))
            out = self.succeed(*self.flags("--iters", 20, "--dry-run"))
        self.assertIn("90 of 201", out)
        with self.small():
            self.fail_in_one_line(
                "train.jsonl holds more than .*, which max_rows takes of training rows",
                *self.flags("--epochs", 1),
            )


if __name__ == "__main__":
    unittest.main()
