# Copyright © 2026 MLX Contributors

import contextlib
import io
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
from test_dataset_fuzz import ROWS
from test_token_cache import facts, make_rows
from tokenizers_for_tests import bos_tokenizer, thinking_tokenizer

from mlx_lm.preference.data import processes
from mlx_lm.preference.data.table import OF_PAIRS
from mlx_lm.preference.data.tokenizer import PairTokenizer
from mlx_lm.tuner.datasets import PreferenceDataset


def make(rows, tokenizer=None, **options):
    with contextlib.redirect_stdout(io.StringIO()):
        tokenizer = tokenizer or thinking_tokenizer()
        return PreferenceDataset(rows, tokenizer, 60, max_bad_rows=1, **options)


class TestProcessCount(unittest.TestCase):
    def test_processors_of_a_container(self):
        with mock.patch("os.sched_getaffinity", lambda _: {3}, create=True):
            self.assertEqual(processes.process_count(), 1)
        with mock.patch("os.sched_getaffinity", lambda _: {*range(64)}, create=True):
            self.assertEqual(processes.process_count(), processes.MOST_PROCESSES)


class TestRowProcesses(unittest.TestCase):
    def setUp(self):
        for what, name, value in (
            (processes, "MANY_ROWS", 1),
            (processes, "process_count", lambda: 2),
            (processes, "PART", 9),
        ):
            patch = mock.patch.object(what, name, value)
            patch.start()
            self.addCleanup(patch.stop)

    def assert_same(self, rows, **options):
        with mock.patch.object(processes, "MANY_ROWS", 10**9):
            alone = make(rows, **options)
        with mock.patch.object(PairTokenizer, "__call__", None):
            # None can't be called: all of it is done elsewhere.
            together = make(rows, **options)
        self.assertEqual(facts(together), facts(alone))
        self.assertEqual(vars(together.notes), vars(alone.notes))
        ours, theirs = together._columns, alone._columns
        for name in ("ids", *OF_PAIRS):
            self.assertEqual(getattr(ours, name).dtype, getattr(theirs, name).dtype)
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        self.assertEqual(ours.kind_names, theirs.kind_names)
        self.assertEqual(list(ours.values), list(theirs.values))
        for name, values in ours.values.items():
            np.testing.assert_array_equal(values, theirs.values[name])

    def test_the_same_pairs_and_notes(self):
        self.assert_same([*make_rows(), *ROWS, {"text": "last"}])
        self.assert_same([*make_rows(), *ROWS], tokenizer=bos_tokenizer())

    def test_rankings_and_labels(self):
        ranking = lambda n: {"prompt": "Is", "ranking": [f" {i}" for i in range(n)]}
        rows = [ranking(2 + i % 3) for i in range(20)] + [{"prompt": "x"}]
        self.assert_same(rows, kind="rankings")
        rows = [
            {"prompt": f"Q{i // 2}", "completion": f" {i}", "label": i % 2}
            for i in range(20)
        ]
        self.assert_same([*rows, {"prompt": "x"}], kind="labels")

    def test_without_help_this_process_does_it(self):
        tokenizer = thinking_tokenizer()
        # What can't be sent.
        tokenizer.lock = threading.Lock()
        self.assertEqual(len(make(make_rows(), tokenizer)), 21)
        with mock.patch.object(processes, "__name__", "no_such_module"):
            self.assertEqual(len(make(make_rows())), 21)

    def test_nothing_in_the_working_folder_runs(self):
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        (folder / "pickle.py").write_text("open('run', 'w')")
        self.enterContext(contextlib.chdir(folder))
        with mock.patch.object(PairTokenizer, "__call__", None):
            self.assertEqual(len(make(make_rows())), 21)
        self.assertFalse((folder / "run").exists())

    def test_what_is_left_early_leaves_nobody(self):
        begun = []
        start = processes._start
        keep = lambda: begun.append(start()) or begun[-1]
        with mock.patch.object(processes, "_start", keep):
            found = processes.in_processes(len, range(100), 2)
            self.assertEqual(next(found), 9)
            self.assertIsNone(begun[0].poll())
            found.close()
        self.assertEqual(len(begun), 2)
        for process in begun:
            self.assertIsNotNone(process.poll())


if __name__ == "__main__":
    unittest.main()
