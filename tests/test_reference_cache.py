# Copyright © 2026 MLX Contributors

import contextlib
import io
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np

from mlx_lm.preference.data.table import ColumnsBuilder
from mlx_lm.preference.data.tokenizer import TokenPair
from mlx_lm.preference.digest import digest
from mlx_lm.preference.reference import cache as reference_cache
from mlx_lm.preference.reference.cache import ReferenceCache, pair_key, pair_keys

NAME = "0" * 64


def numbers(n, seed=0):
    rng = np.random.default_rng(seed)
    keys = [rng.bytes(16) for _ in range(n)]
    return keys, -rng.random((n, 2)).astype(np.float32)


def save_some(folder, first):
    """Save every fourth of the numbers, one by one."""
    # Savers wait for each other for as long as a busy machine takes.
    reference_cache.LOCK_SECONDS = 300
    keys, logps = numbers(40)
    cache = ReferenceCache(folder, NAME)
    for i in range(int(first), 40, 4):
        cache.store(keys[i : i + 1], logps[i : i + 1])
        cache.save()


class TestPairKey(unittest.TestCase):
    def test_follows_from_the_ids_and_where_they_are_parted(self):
        base = ([1, 2], [3, 4], [5])
        others = [
            ([1], [2, 3, 4], [5]),
            ([1, 2], [3], [4, 5]),
            ([1, 2], [5], [3, 4]),
            ([1, 2], [3, 4], [6]),
            ([1, 2], [3, 4], [5, 0]),
            ([0, 1, 2], [3, 4], [5]),
            ([2**16 + 1, 2], [3, 4], [5]),
        ]
        keys = {pair_key(*pair) for pair in [base, *others]}
        self.assertEqual(len(keys), 8)
        self.assertEqual({len(key) for key in keys}, {16})
        arrays = [np.array(ids, dtype=np.int64) for ids in base]
        self.assertEqual(pair_key(*arrays), pair_key(*base))

    def test_is_a_digest_of_their_bytes(self):
        parts = [np.array(ids, "<i4").tobytes() for ids in ([7] * 300, [], [1])]
        self.assertEqual(pair_key([7] * 300, [], [1]).hex(), digest(*parts))

    def test_all_pairs_of_a_data_set(self):
        builder = ColumnsBuilder(6)
        for i in range(9):
            pair = TokenPair([*range(i % 5)], [i] * 3, [i, ~i, 2], [], "s", "f")
            builder.add(i, pair)
        for columns in (c := builder.finish(), c.select([4, 8, 2]), c.mismatch(4)):
            pairs = [columns.pair(i) for i in range(len(columns))]
            keys = [pair_key(*pair[:3]) for pair in pairs]
            self.assertEqual(pair_keys(columns), keys)
            last = [ids.tobytes() for ids in pairs[-1][:3]]
            self.assertEqual([*columns.id_bytes()][-1], tuple(last))
            self.assertEqual(pair_keys(pairs), keys)
        self.assertEqual(pair_keys([]) + pair_keys(None), [])


class TestReferenceCache(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name) / "references"

    def open(self, name=NAME, folder=None):
        """A cache and what opening it printed."""
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen):
            cache = ReferenceCache(folder or self.folder, name)
        return cache, screen.getvalue()

    def saved(self, keys, logps, name=NAME):
        cache, _ = self.open(name)
        cache.store(keys, logps)
        cache.save()
        return cache

    def files(self):
        return sorted(p.name for p in self.folder.iterdir())

    def test_numbers_of_a_checkpoint_are_kept_on_the_disk(self):
        keys, logps = numbers(3)
        theirs = ReferenceCache(None, NAME)
        theirs.store(keys, logps)
        cache, _ = self.open()
        cache.absorb(**theirs.arrays())
        cache.save()
        again, _ = self.open()
        np.testing.assert_array_equal(again.lookup(keys), logps)

    def test_remembers_in_memory(self):
        cache = ReferenceCache(None, NAME)
        keys, logps = numbers(5)
        self.assertEqual(cache.unknown(keys), 5)
        self.assertTrue(np.isnan(cache.lookup(keys)).all())
        self.assertEqual(len(cache), 0)
        cache.store(keys[:3], mx.array(logps[:3]))
        self.assertEqual(cache.unknown(keys), 2)
        found = cache.lookup(keys[::-1])
        self.assertEqual(found.dtype, np.float32)
        np.testing.assert_array_equal(found[2:], logps[:3][::-1])
        self.assertTrue(np.isnan(found[:2]).all())
        self.assertEqual(len(cache), 3)
        self.assertEqual(cache.lookup([]).shape, (0, 2))
        cache.save()

    def test_remembers_on_disk_bit_for_bit(self):
        keys, logps = numbers(100)
        self.saved(keys, logps)
        second, screen = self.open()
        np.testing.assert_array_equal(second.lookup(keys), logps)
        self.assertEqual(screen, "")
        third, _ = self.open("1" * 64)
        self.assertEqual(third.unknown(keys), 100)

    def test_a_number_that_is_not_finite_is_not_remembered(self):
        cache = ReferenceCache(None, NAME)
        rows = [[-1, np.nan], [np.inf, -1], [-np.inf, -1], [1e39, -1], [-1, -2]]
        keys, _ = numbers(5)
        with np.errstate(over="ignore"):
            cache.store(keys, np.array(rows))
        self.assertEqual(len(cache), 1)
        self.assertEqual(cache.lookup(keys)[4].tolist(), [-1, -2])

    def test_the_first_number_stays(self):
        keys, logps = numbers(3)
        self.saved(keys[:1], logps[:1])
        cache = self.saved(keys, logps - 1)
        cache.store(keys, logps - 2)
        expected = np.concatenate([logps[:1], logps[1:] - 1])
        np.testing.assert_array_equal(cache.lookup(keys), expected)
        np.testing.assert_array_equal(self.open()[0].lookup(keys), expected)

    def test_a_wrong_shape_is_refused(self):
        for shape in ((2, 3), (1, 2), (4,)):
            with self.assertRaisesRegex(ValueError, "expected \\(2, 2\\)"):
                ReferenceCache(None, NAME).store([b"a", b"b"], np.zeros(shape))

    def test_saves_only_what_is_new(self):
        keys, logps = numbers(4)
        cache = self.saved(keys[:2], logps[:2])
        before = cache.path.read_bytes()
        cache.save()
        cache.store(keys[:2], logps[:2] - 1)
        cache.save()
        self.open()[0].save()
        self.assertEqual(cache.path.read_bytes(), before)
        cache.store(keys, logps)
        cache.save()
        self.assertEqual(len(self.open()[0]), 4)

    def test_two_runs_at_once_keep_both_numbers(self):
        keys, logps = numbers(30)
        one, two = self.open()[0], self.open()[0]
        one.store(keys[:20], logps[:20])
        two.store(keys[10:], logps[10:] - 1)
        one.save()
        two.save()
        merged = np.concatenate([logps[:20], logps[20:] - 1])
        np.testing.assert_array_equal(self.open()[0].lookup(keys), merged)
        # Neither run sees a number of its own change, or come from elsewhere.
        np.testing.assert_array_equal(two.lookup(keys[10:]), logps[10:] - 1)
        self.assertEqual((one.unknown(keys), two.unknown(keys)), (10, 10))

    def test_many_savers_at_once_lose_nothing(self):
        keys, logps = numbers(40)

        # Not forked from this process, whose threads may hold a lock just then.
        work = "import sys, test_reference_cache as t; t.save_some(*sys.argv[1:])"
        words = [sys.executable, "-c", work, str(self.folder)]
        here = Path(__file__).parent
        runs = [subprocess.Popen([*words, str(i)], cwd=here) for i in range(4)]
        for run in runs:
            self.assertEqual(run.wait(300), 0)
        np.testing.assert_array_equal(self.open()[0].lookup(keys), logps)
        self.assertEqual(self.files(), [f"{NAME}.sqlite"])

    def test_a_held_lock_costs_a_bounded_wait_and_one_warning(self):
        keys, logps = numbers(4)
        cache = self.saved(keys[:2], logps[:2])
        cache.store(keys, logps)
        with contextlib.closing(sqlite3.connect(cache.path)) as database:
            database.execute("BEGIN EXCLUSIVE")
            screen = io.StringIO()
            with mock.patch.object(reference_cache, "LOCK_SECONDS", 0.1):
                with contextlib.redirect_stdout(screen):
                    cache.save()
                    cache.save()
                other, warning = self.open()
        self.assertRegex(screen.getvalue(), r"^\[WARNING\] Can't save .*locked.*\n$")
        self.assertRegex(warning, r"^\[WARNING\] Can't read .*locked.*\n$")
        self.assertEqual(len(other), 0)
        cache.save()
        self.assertEqual(len(self.open()[0]), 4)

    def test_only_regular_files_are_opened(self):
        keys, logps = numbers(4)
        target = self.saved(keys, logps, "1" * 64).path
        before = target.read_bytes()
        path = self.folder / f"{NAME}.sqlite"
        journal = self.folder / f"{NAME}.sqlite-journal"
        makers = {
            "folder": path.mkdir,
            "link": lambda: path.symlink_to(target),
            "dangling link": lambda: path.symlink_to(self.folder / "elsewhere"),
            "FIFO": lambda: os.mkfifo(path),
            "FIFO beside it": lambda: (self.saved(keys, logps), os.mkfifo(journal)),
        }
        for name, make in makers.items():
            with self.subTest(name):
                make()
                cache, screen = self.open()
                self.assertRegex(screen, r"^\[WARNING\] Can't read .*regular file.*\n$")
                cache.store(keys, logps - 1)
                cache.save()
                np.testing.assert_array_equal(cache.lookup(keys), logps - 1)
                self.assertEqual(target.read_bytes(), before)
                self.assertFalse((self.folder / "elsewhere").exists())
                path.rmdir() if name == "folder" else path.unlink()

    def test_python_without_sqlite(self):
        keys, logps = numbers(4)
        self.saved(keys, logps)
        with mock.patch.dict(sys.modules, sqlite3=None):
            cache, screen = self.open()
            cache.store(keys, logps)
            cache.save()
        self.assertRegex(screen, r"^\[WARNING\] Can't read .*sqlite3.*\n$")

    def test_a_file_that_went_away_is_written_again(self):
        keys, logps = numbers(4)
        self.saved(keys[:2], logps[:2])
        cache, _ = self.open()
        cache.path.unlink()
        cache.store(keys, logps)
        cache.save()
        self.assertEqual(len(self.open()[0]), 4)

    def check_damaged(self, path, raw):
        path.write_bytes(raw)
        cache, screen = self.open()
        self.assertEqual(len(cache), 0)
        self.assertRegex(screen, r"^\[WARNING\] .*damaged: .* again\.\n$")
        return cache

    def test_a_changed_byte_never_makes_a_wrong_number(self):
        keys, logps = numbers(6)
        path = self.saved(keys, logps).path
        good = path.read_bytes()
        damaged = 0
        for i in range(len(good)):
            # Most of the file is room for more.
            if not good[i] and i % 64:
                continue
            bad = bytearray(good)
            bad[i] ^= 1 << (i % 8)
            with self.subTest(byte=i):
                path.write_bytes(bad)
                cache, screen = self.open()
                if screen:
                    damaged += 1
                    self.assertRegex(screen, r"^\[WARNING\] .* again\.\n$")
                    self.assertEqual(len(cache), 0)
                else:
                    np.testing.assert_array_equal(cache.lookup(keys), logps)
        self.assertGreater(damaged, 6 * 24)

    def test_a_cut_file_is_found(self):
        keys, logps = numbers(600)
        path = self.saved(keys, logps).path
        good = path.read_bytes()
        for size in (*range(0, len(good), 999), len(good) - 1, len(good) - 4096):
            with self.subTest(size=size):
                self.check_damaged(path, good[:size])

    def test_a_foreign_file_is_found_and_replaced(self):
        keys, logps = numbers(6)
        path = self.saved(keys, logps).path
        other = self.saved(keys, logps - 1, "1" * 64).path.read_bytes()
        for raw in (other, b"hello" * 99, b""):
            cache = self.check_damaged(path, raw)
            cache.store(keys, logps)
            screen = io.StringIO()
            with contextlib.redirect_stdout(screen):
                cache.save()
            self.assertEqual(screen.getvalue(), "")
            np.testing.assert_array_equal(self.open()[0].lookup(keys), logps)

    def test_a_folder_that_cannot_be_written_costs_one_warning(self):
        keys, logps = numbers(4)
        self.folder.write_text("a file, not a folder")
        cache, screen = self.open(folder=self.folder / "references")
        self.assertEqual(screen, "")
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen):
            cache.store(keys[:2], logps[:2])
            cache.save()
            cache.store(keys, logps)
            cache.save()
        self.assertRegex(screen.getvalue(), r"^\[WARNING\] Can't save .*\n$")
        np.testing.assert_array_equal(cache.lookup(keys), logps)
        # It is written as soon as that is possible.
        self.folder.unlink()
        cache.save()
        self.assertEqual(len(self.open(folder=cache.path.parent)[0]), 4)

    def test_files_unused_for_longest_make_room(self):
        keys, logps = numbers(50)
        names = [digit * 64 for digit in "abcd"]
        for age, name in zip((40, 30, 20, 10), names, strict=True):
            path = self.saved(keys, logps, name).path
            os.utime(path, (path.stat().st_mtime - age,) * 2)
        size = path.stat().st_size
        model = self.folder / "model.safetensors"
        model.write_bytes(b"\0" * 4 * size)
        os.utime(model, (0, 0))
        # Opened, so that it is in use.
        self.open(names[0])
        with mock.patch.object(reference_cache, "MAX_FOLDER_BYTES", 3 * size):
            self.saved(keys, logps, "e" * 64)
        left = [f"{d * 64}.sqlite" for d in "ade"] + ["model.safetensors"]
        self.assertEqual(self.files(), left)
        # A file alone may be larger than that.
        with mock.patch.object(reference_cache, "MAX_FOLDER_BYTES", 1):
            self.saved(keys, logps, "f" * 64)
        self.assertEqual(self.files(), [f"{'f' * 64}.sqlite", "model.safetensors"])


class Group:
    """Processes as threads: all_gather stacks what each of them brings."""

    def __init__(self, size):
        self._size, self._parts = size, [None] * size
        self._barrier = threading.Barrier(size)
        self.local = threading.local()

    def size(self):
        return self._size

    def all_gather(self, x, group):
        self._parts[self.local.rank] = np.array(x)
        self._barrier.wait(5)
        y = mx.array(np.concatenate(self._parts))
        self._barrier.wait(5)
        return y

    def run(self, work):
        def start(rank):
            self.local.rank = rank
            work(rank)

        with mock.patch.object(mx.distributed, "all_gather", self.all_gather):
            threads = [
                threading.Thread(target=start, args=(rank,))
                for rank in range(self._size)
            ]
            for t in threads:
                t.start()
            for t in threads:
                t.join()


class TestExchange(unittest.TestCase):
    def test_every_rank_gets_all_numbers(self):
        keys, logps = numbers(10)
        caches = [ReferenceCache(None, NAME) for _ in range(3)]
        parts = [range(0, 6), range(6, 6), range(4, 10)]
        group = Group(3)

        def work(rank):
            mine = parts[rank]
            mx.eval(logps_of := mx.array(logps - rank))
            caches[rank].store([keys[i] for i in mine], np.array(logps_of)[list(mine)])
            caches[rank].exchange(group)
            # Nothing is new, but all are called.
            caches[rank].exchange(group)

        group.run(work)
        expected = np.concatenate([logps[:6], logps[6:] - 2])
        for cache in caches:
            np.testing.assert_array_equal(cache.lookup(keys), expected)

    def test_what_one_rank_read_reaches_the_others_and_the_disk(self):
        keys, logps = numbers(7)
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
            for folder, part in ((one, slice(0, 3)), (two, slice(3, 7))):
                cache = ReferenceCache(Path(folder), NAME)
                cache.store(keys[part], logps[part])
                cache.save()
            caches = [ReferenceCache(Path(folder), NAME) for folder in (one, two)]
            group = Group(2)
            group.run(lambda rank: caches[rank].exchange(group))
            caches[0].save()
            for cache in (*caches, ReferenceCache(Path(one), NAME)):
                np.testing.assert_array_equal(cache.lookup(keys), logps)
            self.assertEqual(len(ReferenceCache(Path(two), NAME)), 4)

    def test_one_process_alone(self):
        keys, logps = numbers(3)
        cache = ReferenceCache(None, NAME)
        cache.store(keys, logps)
        cache.exchange(mx.distributed.init())
        np.testing.assert_array_equal(cache.lookup(keys), logps)


if __name__ == "__main__":
    unittest.main()
