# Copyright © 2026 MLX Contributors

import contextlib
import datetime
import hashlib
import io
import json
import os
import subprocess
import sys
import unittest
from unittest import mock

import datasets as hf
import numpy as np
from byte_tokenizers import CHATML, THINKING, make_tokenizer, pair
from folders import FolderCase

from mlx_lm.preference.data import cache as token_cache
from mlx_lm.preference.data import render
from mlx_lm.preference.data.cache import tokenizer_fingerprint
from mlx_lm.preference.data.fingerprint import rows_fingerprint
from mlx_lm.preference.data.sources import FileRows, LocatedRows
from mlx_lm.preference.data.table import (
    CUT,
    EQUAL,
    PARTED,
    ColumnsBuilder,
    TokenColumns,
)
from mlx_lm.preference.data.tokenize import tokenize_rows
from mlx_lm.preference.data.tokenizer import PairTokenizer, TokenPair
from mlx_lm.tokenizer_utils import NewlineTokenizer, TokenizerWrapper
from mlx_lm.tuner.datasets import PreferenceDataset, load_preference_dataset

CHAT = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "a", "rejected": "b"}
TODAY = "{{ strftime_now('%d %b %Y') }}" + CHATML


def make_rows():
    """Rows with every note: skipped ones, cut ones, two kinds, parted prompts."""
    rows = [pair(f"Q{i}:", " yes" * (1 + i % 4), " no") for i in range(12)]
    rows += [{**CHAT, "chosen": f"a{i}"} for i in range(8)]
    rows += [pair(chosen=""), {"text": "x"}, pair("x" * 60)]
    return rows + [pair("same", "y" * 70 + "1", "y" * 70 + "2")]


def facts(dataset):
    """All that a dataset tells."""
    items = [tuple(np.asarray(part).tolist() for part in item) for item in dataset]
    places = [dataset.source_row(i) for i in range(len(dataset))]
    counts = dataset.num_rows, dict(dataset.skipped), dataset.first_skipped
    texts = dataset.summary(), dataset.preview(), dataset.shape, dataset.format
    return items, places, counts, texts, dataset.largest_token()


class CacheFolder(FolderCase):
    def setUp(self):
        super().setUp()
        self.cache = self.folder / "tokens"
        patch = mock.patch.object(token_cache, "MIN_ROWS", 5)
        patch.start()
        self.addCleanup(patch.stop)

    def files(self):
        return sorted(self.cache.iterdir()) if self.cache.exists() else []

    def run_quietly(self, make):
        """The result, the lines printed, and how many rows were tokenized."""
        rows = []
        encode = PairTokenizer.__call__

        def counting(tokenizer, chunk):
            rows.extend(chunk)
            return encode(tokenizer, chunk)

        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            with mock.patch.object(PairTokenizer, "__call__", counting):
                result = make()
        return result, output.getvalue().splitlines(), len(rows)

    def make(self, rows=None, tokenizer=None, max_length=60, **options):
        options = {"max_bad_rows": 0.5, "token_cache": self.cache} | options
        return self.run_quietly(
            lambda: PreferenceDataset(
                make_rows() if rows is None else rows,
                tokenizer or make_tokenizer(THINKING),
                max_length,
                **options,
            )
        )


class TestTokenColumns(unittest.TestCase):
    def build(self, *pairs, max_length=4):
        builder = ColumnsBuilder(max_length)
        for place, ids in enumerate(pairs):
            builder.add(place, TokenPair(*ids, shape="s", format=f"f{place % 2}"))
        return builder.finish()

    def test_pairs_are_cut_and_flagged(self):
        columns = self.build(
            ([1, 2], [3], [4], []),
            ([1, 2], [3, 4, 5], [3, 4, 6], [9]),
            ([], [7, 8, 9, 10, 11], [6], []),
        )
        self.assertEqual(len(columns), 3)
        pairs = [[p.tolist() for p in columns.pair(i)[:3]] for i in range(3)]
        expected = [[1, 2], [3], [4]], [[1, 2], [3, 4], [3, 4]], [[], [7, 8, 9, 10]]
        self.assertEqual(pairs, [*expected[:2], [*expected[2], [6]]])
        self.assertEqual(columns.pair(1)[3], (2, 4, 4))
        self.assertEqual(columns.flags.tolist(), [0, CUT | EQUAL | PARTED, CUT])
        self.assertEqual(columns.largest.tolist(), [4, 4, 10])
        self.assertEqual(
            list(columns.count_kinds().items()), [(("s", "f0"), 2), (("s", "f1"), 1)]
        )
        some = columns.select(iter([1, 0]))
        self.assertEqual(next(iter(some.count_kinds())), ("s", "f1"))
        self.assertEqual(some.pair(1)[0].tolist(), [1, 2])
        with self.assertRaises(IndexError):
            columns.pair(3)

    def test_concatenate(self):
        first = self.build(([1], [2], [3], [])).select([0])
        second = self.build(([4], [5], [6], []), ([7], [8], [9], [])).select([1])
        both = TokenColumns.concatenate([second, first, second])
        self.assertEqual([int(both.pair(i)[0][0]) for i in range(3)], [7, 1, 7])
        self.assertEqual(both.count_kinds(), {("s", "f0"): 1, ("s", "f1"): 2})
        self.assertEqual(both.places.tolist(), [1, 0, 1])
        self.assertEqual(len(self.build()), 0)


class TestHits(CacheFolder):
    def test_second_load_is_the_same(self):
        plain, _, _ = self.make(token_cache=None)
        self.assertEqual(self.files(), [])
        fresh, lines, tokenized = self.make()
        self.assertEqual((lines, tokenized), ([], 22))
        self.assertEqual(len(self.files()), 1)
        again, lines, tokenized = self.make()
        self.assertEqual((lines, tokenized), ([], 0))
        self.assertEqual(facts(again), facts(plain))
        self.assertEqual(facts(fresh), facts(plain))
        np.testing.assert_array_equal(again.pair_lengths(), plain.pair_lengths())
        self.assertEqual(again.pair_lengths().shape, (len(plain), 3))
        # The notes are there to be shown.
        summary = "\n".join(plain.summary())
        for text in ("unknown columns", "prompt fills", "Cut to", "equal answers"):
            self.assertIn(text, summary)
        for text in ("otherwise once an answer", "wrap_text", "of text, text"):
            self.assertIn(text, summary)
        self.assertEqual(facts(again.hold_out(0.3)[0]), facts(plain.hold_out(0.3)[0]))
        both = PreferenceDataset.concatenate([again, fresh])
        self.assertEqual(len(both), 2 * len(plain))

    def test_same_errors(self):
        messages = []
        for _ in range(2):
            with self.assertRaises(ValueError) as caught:
                self.make(max_bad_rows=0)
            messages.append(str(caught.exception))
        self.assertEqual(*messages)
        self.assertIn("row 20", messages[0])
        self.assertEqual(self.make()[2], 0)
        for _ in range(2):
            with self.assertRaisesRegex(ValueError, "no row of 9 can be used"):
                self.make([{"text": "x"}] * 9)

    def test_small_sets_are_not_kept(self):
        self.make([pair()] * 5)
        self.assertEqual(self.files(), [])

    def test_misses(self):
        self.make()
        rows = make_rows()
        rows[3] = pair("Q3:", " yes", " nO")
        other_vocab = make_tokenizer(THINKING)
        other_vocab.add_tokens(["<new>"])
        other_eos = make_tokenizer(THINKING)
        other_eos.eos_token = "<s>"
        other_end = TokenizerWrapper(make_tokenizer(THINKING), eos_token_ids=[3])
        changes = {
            "row": {"rows": rows},
            "order": {"rows": make_rows()[::-1]},
            "place": {"rows": LocatedRows(make_rows(), "train.jsonl")},
            "vocabulary": {"tokenizer": other_vocab},
            "post-processor": {"tokenizer": make_tokenizer(THINKING, bos=True)},
            "eos": {"tokenizer": other_eos},
            "template": {"tokenizer": make_tokenizer(CHATML)},
            "wrapper": {"tokenizer": TokenizerWrapper(make_tokenizer(THINKING))},
            "ends": {"tokenizer": other_end},
            "max_length": {"max_length": 61},
            "wrap_text": {"wrap_text": True},
            "transcripts": {"transcripts": "raw"},
        }
        for name, change in changes.items():
            with self.subTest(name):
                self.assertGreater(self.make(**change)[2], 0)
                self.assertEqual(self.make(**change)[2], 0)
        self.assertEqual(len(self.files()), 1 + len(changes))
        renamed = [{"q": r.pop("prompt", None), **r} for r in make_rows()]
        names = {"prompt_feature": "q", "max_bad_rows": 1}
        self.assertGreater(self.make(renamed, **names)[2], 0)
        names["rejected_feature"] = "rejected_2"
        with self.assertRaises(ValueError):
            self.make(renamed, **names)
        # Rows of a shape that is new were skipped before.
        with mock.patch("mlx_lm.preference.data.tokenize.KNOWN_SHAPES", ["new"]):
            self.assertGreater(self.make()[2], 0)
        with mock.patch.object(token_cache, "VERSION", 99):
            self.assertGreater(self.make()[2], 0)
        with mock.patch.object(token_cache, "__version__", "0"):
            self.assertGreater(self.make()[2], 0)
        self.assertEqual(self.make()[2], 0)

    def test_other_tokens_need_another_version(self):
        mixed = [{**row, "w": 2, "gap": i} for i, row in enumerate(make_rows())]
        turns = "\n\nHuman: Hi\n\nAssistant: "
        mixed += [{"chosen": turns + "a", "rejected": turns + "b"}]
        ranked = [{"prompt": f"{i}:", "ranking": ["a", " b", "c"]} for i in range(3)]
        labels = [{"prompt": f"{i}?", "completion": "a b", "label": i} for i in (0, 1)]
        ids = make_tokenizer().encode("yes") + [1]
        given = [{**CHAT, "chosen": "yes", "chosen_tokens": ids}] * 2
        cases = [
            (given, {}),
            (mixed, {"weight_feature": "w", "margin_feature": "gap"}),
            (mixed, {"turns": True}),
            (mixed, {"wrap_text": True}),
            (ranked, {}),
            (ranked, {"kind": "rankings"}),
            (labels + mixed, {"kind": "labels"}),
        ]
        found = hashlib.blake2b(digest_size=8)
        for tokenizer in (make_tokenizer(bos=True), make_tokenizer(THINKING)):
            encode = PairTokenizer(tokenizer)
            for rows, options in cases:
                options = {"wrap_text": False, **options}
                if encode.has_chat_template or not options["wrap_text"]:
                    columns, notes = tokenize_rows(rows, encode, 60, options)
                    for array in token_cache._arrays("", columns, notes):
                        found.update(array.tobytes())
        self.assertEqual(
            (token_cache.VERSION, found.hexdigest()),
            (15, "ae86a4fa43ff6f94"),
            "Rows became other tokens or notes: raise VERSION in data/cache.py, and "
            "write it here with its digest.",
        )

    def test_templates_with_a_date(self):
        tokenizer = make_tokenizer(TODAY)
        clock = mock.patch.object(render, "date", wraps=datetime.date)
        with clock as fake:
            for day, expected in ((1, 20), (1, 0), (2, 20)):
                fake.today.return_value = datetime.date(2026, 1, day)
                dataset, _, tokenized = self.make([CHAT] * 20, tokenizer)
                self.assertEqual(tokenized, expected)
                text = tokenizer.decode(dataset[0][0].tolist())
                self.assertTrue(text.startswith(f"0{day} Jan 2026<|im_start|>"))
            # A run that was started on another day has its date.
            day = {"template_date": "2026-01-01"}
            self.assertEqual(self.make([CHAT] * 20, tokenizer, **day)[2], 0)
            # A template without a date has none to differ in.
            tokenizer = make_tokenizer(CHATML)
            self.assertEqual(self.make([CHAT] * 20, tokenizer, **day)[2], 20)
            self.assertEqual(self.make([CHAT] * 20, tokenizer)[2], 0)

    def test_a_date_in_any_format(self):
        for template, expected in (
            ("{% set f = '%Y' %}{{ strftime_now(f) }}", "2026"),
            ("{{ strftime_now('%d %b %H:%M') }}", "02 Jan 00:00"),
            (
                "\n{%- macro m() %}{{ strftime_now('%-d.%m.') }}{% endmacro %}{{ m() }}",
                "2.01.",
            ),
            (
                "\n\n{% if strftime_now is defined %}{{ strftime_now('%B') }}{% endif %}",
                "\n\nJanuary",
            ),
        ):
            tokenizer = make_tokenizer(template + CHATML)
            given = {"template_date": "2026-01-02", "token_cache": None}
            dataset, *_ = self.make([CHAT] * 20, tokenizer, **given)
            with self.subTest(template=template):
                text = tokenizer.decode(dataset[0][0].tolist())
                self.assertTrue(text.startswith(f"{expected}<|im_start|>"), text)


class TestFiles(CacheFolder):
    def test_damaged_files(self):
        fresh, _, _ = self.make()
        (path,) = self.files()
        good = path.read_bytes()
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 1
        damaged = [b"", good[:30], good[:-1], good[: len(good) // 2], bytes(flipped)]
        damaged += [b"x" + good[1:], good + b"x"]
        for content in damaged:
            with self.subTest(size=len(content)):
                path.write_bytes(content)
                again, lines, tokenized = self.make()
                self.assertEqual(tokenized, 22)
                self.assertEqual(len(lines), 1)
                self.assertRegex(lines[0], r"^\[WARNING\] Ignoring .*damaged")
                self.assertEqual(facts(again), facts(fresh))
                self.assertEqual(self.files(), [path])
                self.assertEqual(path.read_bytes(), good)
        # A whole file under another one's name.
        self.make(max_length=61)
        other = next(file for file in self.files() if file != path)
        other.write_bytes(good)
        self.assertIn("damaged", self.make(max_length=61)[1][0])

    def test_a_fifo_is_neither_opened_nor_replaced(self):
        self.make()
        (path,) = self.files()
        path.unlink()
        os.mkfifo(path)
        _, lines, count = self.make()
        self.assertEqual((len(lines), count), (1, 22))
        self.assertIn("It is no regular file.", lines[0])
        self.assertTrue(path.is_fifo())

    def test_a_folder_that_cant_be_made(self):
        (self.folder / "file").write_text("")
        dataset, lines, _ = self.make(token_cache=self.folder / "file" / "tokens")
        self.assertEqual(len(lines), 1)
        self.assertTrue(lines[0].startswith("[WARNING] Can't keep the token ids"))
        self.assertEqual(len(dataset), 21)

    def test_nothing_is_left_of_a_failed_write(self):
        with mock.patch("os.replace", side_effect=OSError(28, "No space left")):
            _, lines, _ = self.make()
        self.assertIn("No space left", lines[0])
        self.assertEqual(self.files(), [])

    def test_the_oldest_files_go(self):
        for length in (60, 61, 62):
            self.make(max_length=length)
        size = max(file.stat().st_size for file in self.files())
        for age, file in enumerate(self.files()):
            os.utime(file, (1000 - age, 1000 - age))
        self.make(max_length=61)  # Found, and thus the newest.
        newest = max(self.files(), key=lambda file: file.stat().st_mtime)
        half_written = self.cache / ".x.1.tmp.tokens"
        half_written.write_bytes(bytes(10))
        os.utime(half_written, (1, 1))
        with mock.patch.object(token_cache, "MAX_BYTES", 2 * size + 20):
            self.make(max_length=63)
        self.assertEqual(len(self.files()), 2)
        self.assertIn(newest, self.files())
        self.assertEqual(self.make(max_length=63)[2], 0)
        with mock.patch.object(token_cache, "MAX_BYTES", 0):
            self.make(max_length=64)
        self.assertEqual(len(self.files()), 1)
        self.assertEqual(self.make(max_length=64)[2], 0)


class TestFingerprints(CacheFolder):
    def test_tokenizers(self):
        self.assertEqual(
            tokenizer_fingerprint(make_tokenizer(CHATML)),
            tokenizer_fingerprint(make_tokenizer(CHATML)),
        )
        self.assertIsNotNone(tokenizer_fingerprint(make_tokenizer(None)))
        self.assertIsNotNone(
            tokenizer_fingerprint(make_tokenizer(kind=NewlineTokenizer))
        )
        # Code that may change without a sign.
        own = type("Own", (NewlineTokenizer,), {"__module__": "own"})
        self.assertIsNone(tokenizer_fingerprint(make_tokenizer(kind=own)))
        self.assertIsNone(tokenizer_fingerprint(object()))
        render = lambda *args, **kwargs: ""
        wrapper = TokenizerWrapper(make_tokenizer(), chat_template=render)
        self.assertIsNone(tokenizer_fingerprint(wrapper))
        self.assertEqual(self.make(tokenizer=wrapper, max_bad_rows=1)[2], 22)
        self.assertEqual(self.files(), [])

    def test_truncation_of_the_file_does_not_count(self):
        tokenizer = make_tokenizer()
        before = tokenizer_fingerprint(tokenizer)
        tokenizer.backend_tokenizer.enable_truncation(3)
        tokenizer.backend_tokenizer.enable_padding(length=50)
        self.assertEqual(tokenizer_fingerprint(tokenizer), before)

    def test_other_processes_agree(self):
        tokenizer = make_tokenizer(CHATML)
        tokenizer.save_pretrained(self.folder)
        code = (
            "import sys; from pathlib import Path\n"
            "from mlx_lm.tokenizer_utils import load\n"
            "from mlx_lm.preference.data.cache import *\n"
            "print(tokenizer_fingerprint(load(Path(sys.argv[1]))))\n"
            "print(rows_fingerprint([{'a': 'b', 'c': [1.5, None]}]))\n"
        )
        runs = [
            subprocess.run(
                [sys.executable, "-c", code, str(self.folder)],
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONHASHSEED": seed},
            ).stdout
            for seed in ("1", "2")
        ]
        self.assertEqual(*runs)
        self.assertRegex(runs[0], r"^[0-9a-f]{32}\n[0-9a-f]{32}\n$")

    def test_rows(self):
        variants = [
            *([{"a": 1}], [{"a": 1.0}], [{"a": True}], [{"a": "1"}], [{"b": 1}], []),
            *([{"a": 1}, {"a": 1}], [{"a": (1,)}], [{"a": [1]}]),
            hf.Dataset.from_list([{"a": 1}]),
            hf.Dataset.from_list([{"a": 2}]),
            LocatedRows([{"a": 1}], "name"),
            LocatedRows([{"a": 1}], "other"),
            LocatedRows(hf.Dataset.from_list([{"a": 1}]), "name"),
            LocatedRows(hf.Dataset.from_list([{"a": 2}]), "name"),
        ]
        prints = list(map(rows_fingerprint, variants))
        self.assertEqual(len(set(prints)), len(variants))
        self.assertNotIn(None, prints)
        self.assertIsNone(rows_fingerprint([{"a": lambda: 1}]))

    def test_file_rows(self):
        path = self.folder / "train.jsonl"
        path.write_text(json.dumps(pair()) + "\n")
        first = rows_fingerprint(FileRows([path]))
        rows = FileRows([path])
        self.assertEqual(len(rows), 1)
        # What was read counts, not what lies there now.
        path.write_text(json.dumps(pair("new")) + "\n")
        self.assertEqual(rows_fingerprint(rows), first)
        self.assertNotEqual(rows_fingerprint(FileRows([path])), first)
        self.assertEqual((rows[0], rows.location(0)), (pair(), "train.jsonl:1"))
        same = self.folder / "other.jsonl"
        same.write_text(json.dumps(pair()) + "\n")
        self.assertNotEqual(rows_fingerprint(FileRows([same])), first)
        self.assertIsNone(rows_fingerprint(FileRows([self.folder / "none.jsonl"])))


class TestPipeline(CacheFolder):
    def load(self, **options):
        options = {"token_cache": str(self.cache), "max_bad_rows": 0.5} | options
        data = options.pop("data", self.folder)
        return self.run_quietly(
            lambda: load_preference_dataset(data, make_tokenizer(CHATML), **options)
        )

    def test_local_files(self):
        path = self.folder / "train.jsonl"
        text = "".join(json.dumps(row) + "\n" for row in make_rows())
        path.write_text(text + "broken\n")
        (train, valid, _), lines, _ = self.load(seed=1)
        self.assertEqual(len(self.files()), 1)
        with mock.patch("mlx_lm.preference.data.sources._read") as read:
            (again, held, _), same, tokenized = self.load(seed=1)
        # Neither read nor tokenized.
        self.assertFalse(read.called)
        self.assertEqual((same, tokenized), (lines, 0))
        self.assertEqual(facts(again), facts(train))
        self.assertEqual(facts(held), facts(valid))
        self.assertIn("train.jsonl:", str(again.source_row(0)))
        path.write_text(text)
        (train, *_), _, tokenized = self.load(seed=1)
        self.assertGreater(tokenized, 0)
        self.assertEqual(train.skipped["unreadable JSON"], 0)

    def test_hub_data(self):
        data = hf.Dataset.from_list([{**CHAT, "chosen": f"a{i}"} for i in range(20)])
        with mock.patch("datasets.load_dataset", lambda *_, **__: {"train": data}):
            (train, *_), _, _ = self.load(data="some/prefs")
            (again, *_), _, tokenized = self.load(data="some/prefs")
        self.assertEqual(tokenized, 0)
        self.assertEqual(facts(again), facts(train))

    def test_settings(self):
        rows = "".join(json.dumps(row) + "\n" for row in make_rows())
        (self.folder / "train.jsonl").write_text(rows)
        self.load(token_cache=False)
        self.assertEqual(self.files(), [])
        home = self.folder / "home"
        with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(home)}):
            self.load(token_cache=None)
            self.assertEqual(len(list((home / "mlx_lm" / "tokens").iterdir())), 1)
            self.assertEqual(self.load(token_cache=None)[2], 0)


if __name__ == "__main__":
    unittest.main()
