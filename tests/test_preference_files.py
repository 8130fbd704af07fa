# Copyright © 2026 MLX Contributors

import csv
import gzip
import io
import json
import types
import unittest
from contextlib import redirect_stdout
from unittest import mock

import datasets as hf
import pyarrow
from folders import FolderCase
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_lm.preference.data.hub import find_hub_name, open_hub_splits
from mlx_lm.preference.data.sources import (
    FileRows,
    LocatedRows,
    open_local_splits,
    pick_splits,
)
from mlx_lm.tuner.datasets import PreferenceDataset, load_preference_dataset

hf.disable_progress_bars()


def make_tokenizer(words=200):
    vocab = {f"w{i}": i for i in range(words)} | {"</s>": words, "?": words + 1}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def make_rows(start, count):
    """Pairs with the prompt wN, so that a pair's first id tells its row."""
    return [
        {"prompt": f"w{i}", "chosen": " w1 w2", "rejected": " w3"}
        for i in range(start, start + count)
    ]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def lines_of_cells(rows, delimiter):
    table = io.StringIO()
    writer = csv.writer(table, delimiter=delimiter, lineterminator="\n")
    writer.writerows([list(rows[0]), *(row.values() for row in rows)])
    return table.getvalue()


def quoted(cell):
    return cell.replace('"', '""')


def first_ids(dataset):
    return [int(item[0][0]) for item in dataset]


class TempFolder(FolderCase):
    def write(self, name, content):
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def load(self, **kwargs):
        """The three sets, and what was printed."""
        output = io.StringIO()
        with redirect_stdout(output):
            data = kwargs.pop("data", self.folder)
            sets = load_preference_dataset(data, make_tokenizer(), **kwargs)
        return sets, output.getvalue()


class TestReadFiles(TempFolder):
    def test_kinds(self):
        rows = make_rows(0, 3)
        parquet.write_table(pyarrow.Table.from_pylist(rows), self.folder / "a.parquet")
        text = lines(rows)
        self.write("a.jsonl", "\ufeff" + text.replace("\n", "\r\n\n", 1))
        self.write("b.jsonl.gz", gzip.compress(text.encode()))
        self.write("c.json", json.dumps(rows, indent=2))
        self.write("d.json", text)
        self.write("e.json.gz", gzip.compress(json.dumps(rows).encode()))
        for path in sorted(self.folder.iterdir()):
            with self.subTest(file=path.name):
                self.assertEqual(list(FileRows([path])), rows)
        path = self.write("f.json", json.dumps(rows[0], indent=2))
        self.assertEqual(list(FileRows([path])), rows[:1])
        both = FileRows([self.folder / "a.jsonl", self.folder / "a.parquet"])
        self.assertEqual(len(both), 6)
        self.assertEqual(both.location(1), "a.jsonl:3")
        self.assertEqual(both.location(4), "a.parquet:2")
        self.assertEqual(FileRows([self.folder / "c.json"]).location(1), "c.json[1]")

    def test_bad_lines_are_rows(self):
        good = lines(make_rows(0, 1)).encode()
        parts = [good, b'{"prompt": "w1"\n', b'{"prompt": "\xff"}\n', b"[1]\n", good]
        rows = FileRows([self.write("train.jsonl", b"".join(parts))])
        self.assertEqual(len(rows), 5)
        self.assertEqual(
            [getattr(row, "reason", None) for row in rows],
            [None, "unreadable JSON", "invalid UTF-8", "not a JSON object", None],
        )
        dataset = PreferenceDataset(rows, make_tokenizer(), max_bad_rows=0.6)
        self.assertEqual(len(dataset), 2)
        self.assertEqual(dataset.first_skipped["invalid UTF-8"], "train.jsonl:3")
        self.assertEqual(dataset.source_row(1), "train.jsonl:5")

    def test_unreadable_files(self):
        nested = "[" * 100_000
        for name, content, what in (
            ("a.jsonl", "", "is empty"),
            ("b.jsonl", "\n\n", "is empty"),
            ("c.jsonl", "prompt,chosen,rejected\na,b,c\n", "no JSON object"),
            ("d.json", "[1, 2]", "no JSON object"),
            ("e.json", nested, "Can't read .*maximum recursion"),
            ("f.jsonl.gz", gzip.compress(b"{}\n" * 99)[:-9], "Can't read"),
            ("g.parquet", "no parquet", "Can't read"),
        ):
            with self.subTest(file=name):
                with self.assertRaisesRegex(ValueError, what) as caught:
                    len(FileRows([self.write(name, content)]))
                self.assertNotIn("\n", str(caught.exception))
                self.assertIn(name, str(caught.exception))

    def test_other_forms(self):
        """What other programs write."""
        rows = make_rows(0, 3)
        rows[1]["prompt"] = 'w1, "w2"\nw3'
        table = io.StringIO()
        writer = csv.DictWriter(table, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        text = table.getvalue()
        arrow = io.BytesIO()
        whole = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_file(arrow, whole.schema) as file:
            file.write_table(whole)
        pretty = "".join(json.dumps(row, indent=2) + "\n" for row in rows)
        forms = {
            "a.csv": text,
            "b.csv": "\ufeff" + text,
            "c.CSV": text.encode("utf-16"),
            "d.csv.gz": gzip.compress(text.encode()),
            "e.tsv": lines_of_cells(rows, "\t"),
            "f.csv": lines_of_cells(rows, ";"),
            "g.jsonl": lines(rows).encode("utf-16"),
            "h.json": pretty,
            "i.json": pretty.replace("}\n{", "} {"),
            "j.arrow": arrow.getvalue(),
        }
        for name, content in forms.items():
            with self.subTest(file=name):
                self.assertEqual(list(FileRows([self.write(name, content)])), rows)
        self.assertEqual(FileRows([self.folder / "a.csv"]).location(1), "a.csv:4")
        self.assertEqual(FileRows([self.folder / "h.json"]).location(1), "h.json:6")

    def test_cells(self):
        turns = [{"role": "user", "content": "w1"}]
        path = self.write(
            "a.csv",
            ",prompt,chosen,score,label,note\n"
            f'0,"{quoted(json.dumps(turns))}",1,1.5,True,x\n'
            f'1,"{quoted(repr(turns))}",2,,false,\n'
            '2,"[{w1}]",3,2,true,\n'
            "3,w1,4,2\n",
        )
        rows = FileRows([path])
        self.assertEqual(
            rows[:2],
            [
                {"prompt": turns, "chosen": "1", "score": 1.5, "label": True}
                | {"note": "x"},
                {"prompt": turns, "chosen": "2", "score": None, "label": False}
                | {"note": None},
            ],
        )
        self.assertEqual(str(rows[2]), "unreadable list: prompt")
        self.assertEqual(str(rows[3]), "not a row of the table: 4 cells for 6 columns")

    def test_dates_that_python_lacks(self):
        rows = make_rows(0, 2)
        # Such as milliseconds that somebody took for seconds.
        when = pyarrow.array([1_700_000_000_000, 0], pyarrow.timestamp("s"))
        nested = pyarrow.StructArray.from_arrays([when], ["at"])
        path = self.folder / "a.parquet"
        for column, first in ((when, rows[0]), (nested, "a date that Python lacks")):
            table = pyarrow.Table.from_pylist(rows).append_column("created", column)
            parquet.write_table(table, path)
            found = list(FileRows([path]))
            self.assertEqual(str(found[0]), str(first))
            self.assertLessEqual(rows[1].items(), found[1].items())

    def test_cells_with_lists_of_texts(self):
        rows = [{"note": '["a"]', "ranking": [" a", " b"], "chosen_tokens": [1, 2]}]
        for dump in (json.dumps, repr):
            cells = [{k: dump(v) for k, v in rows[0].items()} | {"note": '["a"]'}]
            path = self.write("a.csv", lines_of_cells(cells, ","))
            self.assertEqual(list(FileRows([path])), rows)

    def test_the_reason_and_the_place(self):
        row = json.dumps(make_rows(0, 1)[0])
        cut = json.dumps(make_rows(0, 9), indent=1)[:-30]
        for name, content, what in (
            ("a.json", f"[{row},\n{row},\n]", r"a.json: .*: line 3 column 1 "),
            (
                "b.jsonl",
                f"{row},\n{row},\n",
                rf"b.jsonl: .*: line 1 column {len(row) + 1} ",
            ),
            (
                "c.jsonl",
                f"{row[:-1]},}}\n" * 2,
                rf"c.jsonl: .*: line 1 column {len(row) + 1} ",
            ),
            ("d.json", cut, r"d.json: unreadable JSON, .*: line 44 column "),
            ("e.jsonl", b"\xff\xfea", "e.jsonl: 'utf-16.* truncated data"),
            ("f.txt", "hello\nyou", r"\(f.txt:1: unreadable JSON, Expecting value: .*"),
            ("g.csv", 'a,b\n"c', "g.csv: unexpected end of data, at line 2"),
            ("h.csv", b"a,b\n\xff,c", "h.csv: 'utf-8' codec .* in position 4"),
            ("i.csv", "a,a\n1,2", "i.csv names a column twice: a, a"),
            ("j.csv", "a,b\n", "j.csv is empty"),
            ("k.arrow", "no arrow", "Can't read .*k.arrow"),
        ):
            with self.subTest(file=name):
                with self.assertRaisesRegex(ValueError, what) as caught:
                    len(FileRows([self.write(name, content)]))
                self.assertNotIn("\n", str(caught.exception))

    def test_a_broken_first_line_is_one_row(self):
        text = '{"prompt": "w1\n' + lines(make_rows(0, 2))
        rows = FileRows([self.write("train.jsonl", text)])
        self.assertEqual((len(rows), rows[1]["prompt"]), (3, "w0"))

    def test_located_rows(self):
        rows = LocatedRows(make_rows(0, 2), "prefs[train]")
        self.assertEqual((len(rows), rows[1]["prompt"]), (2, "w1"))
        self.assertEqual(rows.location(1), "prefs[train]:2")


class TestLocalSplits(TempFolder):
    def test_aliases(self):
        self.assertEqual(
            pick_splits(["train_sft", "test_sft", "train_prefs", "test-prefs"]),
            {"train": "train_prefs", "test": "test-prefs"},
        )
        for name in ("valid", "validation", "val", "dev", "eval", "Validation"):
            self.assertEqual(pick_splits([name]), {"valid": name})
        self.assertEqual(pick_splits(["train", "train_prefs"])["train"], "train_prefs")
        self.assertEqual(pick_splits(["notes"]), {})

    def test_folder(self):
        self.write("train.jsonl", lines(make_rows(0, 2)))
        self.write("dev.json", json.dumps(make_rows(2, 1)))
        self.write(
            "test_prefs.jsonl.gz", gzip.compress(lines(make_rows(3, 1)).encode())
        )
        self.write("README.md", "about")
        splits = open_local_splits(self.folder)
        self.assertEqual(
            [len(splits[s]()) for s in ("train", "valid", "test")], [2, 1, 1]
        )
        for kind, sign in (("csv", ","), ("tsv", "\t")):
            cells = gzip.compress(lines_of_cells(make_rows(0, 3), sign).encode())
            (self.folder / kind).mkdir()
            self.write(f"{kind}/train.{kind}.gz", cells)
            rows = open_local_splits(self.folder / kind)["train"]()
            self.assertEqual(list(rows), make_rows(0, 3))

    def test_shards_in_data_folder(self):
        (self.folder / "data").mkdir()
        for i in range(2):
            name = f"train-0000{i}-of-00002-1a2b.parquet"
            table = pyarrow.Table.from_pylist(make_rows(i, 1))
            parquet.write_table(table, self.folder / "data" / name)
        rows = open_local_splits(self.folder)["train"]()
        self.assertEqual([row["prompt"] for row in rows], ["w0", "w1"])

    def test_two_kinds_of_one_split(self):
        self.write("train.jsonl", lines(make_rows(0, 1)))
        self.write("train.jsonl.gz", gzip.compress(lines(make_rows(0, 2)).encode()))
        with redirect_stdout(io.StringIO()) as output:
            splits = open_local_splits(self.folder)
        self.assertEqual(len(splits["train"]()), 1)
        self.assertIn("Reading train.jsonl, not train.jsonl.gz", output.getvalue())

    def test_saved_to_disk(self):
        one = hf.Dataset.from_list(make_rows(0, 3))
        one.save_to_disk(str(self.folder / "one"), num_shards=2)
        both = hf.DatasetDict({"train_prefs": one, "test": one.select([1])})
        both.save_to_disk(str(self.folder / "both"))
        alone = hf.DatasetDict({"default": one})
        alone.save_to_disk(str(self.folder / "alone"))
        for name in ("one", "both", "alone"):
            splits = open_local_splits(self.folder / name)
            self.assertEqual(list(splits["train"]()), list(one))
        test = open_local_splits(self.folder / "both")["test"]()
        self.assertEqual((len(test), test[0]["prompt"]), (1, "w1"))
        hf.DatasetDict({"a": one, "b": one}).save_to_disk(str(self.folder / "two"))
        for name, broken, what in (
            ("two", None, "no split that is known by its name, only a, b"),
            ("both", "dataset_dict.json", "dataset_dict.json is damaged"),
            ("one", "state.json", "state.json is damaged"),
        ):
            with self.assertRaisesRegex(ValueError, what):
                if broken:
                    (self.folder / name / broken).write_text("{")
                open_local_splits(self.folder / name)

    def test_data_dir_and_single_file(self):
        path = self.write("harmless/train.jsonl.gz", gzip.compress(b"{}\n"))
        self.assertEqual(list(open_local_splits(self.folder, "harmless")), ["train"])
        self.assertEqual(list(open_local_splits(path)), ["train"])
        for arguments in ((self.folder / "none",), (self.folder,)):
            with self.assertRaisesRegex(ValueError, "Found no"):
                open_local_splits(*arguments)


class TestLoadPreferenceDataset(TempFolder):
    def test_folder(self):
        for i, name in enumerate(("train", "valid", "test")):
            self.write(f"{name}.jsonl", lines(make_rows(10 * i, 3)))
        (train, valid, test), output = self.load()
        self.assertEqual(first_ids(train), [0, 1, 2])
        self.assertEqual(first_ids(valid), [10, 11, 12])
        self.assertEqual((test, output), ([], ""))
        (train, valid, test), _ = self.load(train=False, test=True)
        self.assertEqual((train, valid, first_ids(test)), ([], [], [20, 21, 22]))

    def test_only_what_is_needed_is_read(self):
        self.write("train.jsonl", lines(make_rows(0, 3)))
        self.write("valid.jsonl", lines(make_rows(3, 1)))
        self.write("test.jsonl", "broken")
        self.load()
        self.write("test.jsonl", lines(make_rows(4, 1)))
        self.write("train.jsonl", "broken")
        self.load(train=False, test=True)

    def test_missing_sets(self):
        self.write("train.jsonl", "broken")
        # The missing set is found out before the broken one is read.
        with self.assertRaisesRegex(ValueError, "Found no test set"):
            self.load(test=True)
        self.write("test.jsonl", lines(make_rows(0, 1)))
        (self.folder / "train.jsonl").unlink()
        with self.assertRaisesRegex(ValueError, "Found no train set"):
            self.load()

    def test_held_out(self):
        path = self.write("pairs.json", json.dumps(make_rows(0, 100)))
        (train, valid, _), output = self.load(data=str(path), seed=1)
        self.assertEqual((len(train), len(valid)), (98, 2))
        self.assertEqual(sorted(first_ids(train) + first_ids(valid)), list(range(100)))
        self.assertEqual(
            output,
            "No validation set: held out 2 of 100 training pairs "
            "(valid_fraction 0.02, seed 1).\n",
        )
        (_, again, _), _ = self.load(data=str(path), seed=1)
        self.assertEqual(first_ids(again), first_ids(valid))
        (_, other, _), _ = self.load(data=str(path), seed=2, valid_fraction=0.3)
        self.assertEqual(len(other), 30)
        (train, other, _), output = self.load(data=str(path), valid_fraction=0)
        self.assertEqual((len(train), other), (100, []))
        self.assertIn("[WARNING]", output)
        with self.assertRaisesRegex(ValueError, "valid_fraction"):
            self.load(valid_fraction=1.0)

    def test_options(self):
        row = {"q": "w1 w1", "good": " w2 w2 w2", "bad": " w3"}
        self.write("train.jsonl", lines([row]))
        names = {"prompt_feature": "q", "chosen_feature": "good"}
        (train, _, _), _ = self.load(**names, rejected_feature="bad", max_length=4)
        self.assertEqual(train[0][3], (2, 4, 4))
        with self.assertRaisesRegex(ValueError, "train.jsonl:1"):
            self.load()
        with self.assertRaisesRegex(ValueError, "wrap_text"):
            self.load(wrap_text=True)


class TestHub(TempFolder):
    def setUp(self):
        super().setUp()
        self.hub = {
            "Anthropic/hh-rlhf": {
                "train_sft": make_rows(90, 9),
                "train_prefs": make_rows(0, 50),
                "test_prefs": make_rows(50, 4),
            },
            "one/split": {"default": make_rows(0, 3)},
            "two/splits": {"a": make_rows(0, 1), "b": make_rows(1, 1)},
        }
        self.calls = []
        patches = (
            mock.patch("datasets.load_dataset", self.load_dataset),
            mock.patch("huggingface_hub.HfApi", lambda: self),
        )
        for patch in patches:
            patch.start()
            self.addCleanup(patch.stop)

    def load_dataset(self, path, split=None, **config):
        self.calls.append((path, split, config))
        if path == "offline/data":
            raise ConnectionError("no\nnetwork")
        if path == "broken/data":
            raise hf.exceptions.DatasetGenerationError("it") from ValueError("row 5")
        if path == "script/data":
            raise RuntimeError("Dataset scripts are no longer supported, but found a")
        if path not in self.hub:
            raise hf.exceptions.DatasetNotFoundError(f"{path} is not there")
        splits = {k: hf.Dataset.from_list(v) for k, v in self.hub[path].items()}
        if split is None:
            return hf.DatasetDict(splits)
        base, _, part = split.partition("[")
        percent = int(part.strip(":-%]") or 100)
        rows = splits[base]
        return rows.select(range(len(rows) * percent // 100))

    def list_datasets(self, search, limit):
        ids = [name for name in self.hub if search.lower() in name.lower()]
        return [types.SimpleNamespace(id=name) for name in ids[:limit]]

    def test_layout(self):
        (train, valid, test), output = self.load(data="Anthropic/hh-rlhf", test=True)
        self.assertEqual((len(train), len(valid), len(test)), (49, 1, 4))
        self.assertEqual(sorted(first_ids(train) + first_ids(valid)), list(range(50)))
        self.assertEqual(test.source_row(1), "Anthropic/hh-rlhf[test_prefs]:2")
        self.assertIn("Loading Hugging Face dataset Anthropic/hh-rlhf.", output)
        self.load(data="Anthropic/hh-rlhf", data_dir="harmless-base")
        self.assertEqual(self.calls[-1][2], {"data_dir": "harmless-base"})

    def test_any_letter_case(self):
        (train, *_), output = self.load(data="anthropic/HH-rlhf")
        self.assertEqual(len(train), 49)
        self.assertIn("Anthropic/hh-rlhf", output)
        self.assertEqual(find_hub_name("anthropic/hh-rlhf"), "Anthropic/hh-rlhf")
        self.assertIsNone(find_hub_name("Anthropic/hh-rlhf"))
        self.assertIsNone(find_hub_name("nobody/nothing"))

    def test_errors(self):
        for data, what in (
            ("nobody/nothing", "no such file or folder, and no dataset"),
            ("offline/data", "no network"),
            ("broken/data", "Can't load broken/data: row 5"),
            ("script/data", r"found a\. .* config {revision: refs/convert/parquet}"),
            ({"path": "a/b", "config": {"split": "train"}}, "a/b has split: leave it"),
            ({"path": "a/b", "config": {"streaming": True}}, "has streaming: leave it"),
            ("two/splits", "only a, b"),
            ("./nobody/nothing", "Found no data at nobody/nothing"),
        ):
            with self.subTest(data=data):
                with self.assertRaisesRegex(ValueError, what) as caught:
                    self.load(data=data)
                self.assertNotIn("\n", str(caught.exception))
        (train, *_), _ = self.load(data="one/split", valid_fraction=0)
        self.assertEqual(len(train), 3)

    def test_hf_dataset(self):
        dataset = {
            "path": "Anthropic/hh-rlhf",
            "train_split": "train_prefs[:10%]",
            "valid_split": "test_prefs",
            "config": {"name": "default"},
        }
        before = dict(dataset)
        (train, valid, test), _ = self.load(data=dataset)
        self.assertEqual((len(train), len(valid), test), (5, 4, []))
        self.assertEqual(dataset, before)
        self.assertEqual(self.calls[-1][2], {"name": "default"})
        with self.assertRaisesRegex(ValueError, "Found no test set"):
            self.load(data=dataset, test=True)

    def test_hf_dataset_list(self):
        self.hub["own/names"] = {
            "train": [{"q": f"w{i}", "a": " w1", "b": " w2"} for i in range(60, 64)],
            "validation": [{"q": "w70", "a": " w1", "b": " w2"}],
        }
        own = {
            "path": "own/names",
            "prompt_feature": "q",
            "chosen_feature": "a",
            "rejected_feature": "b",
        }
        prefs = {"path": "Anthropic/hh-rlhf", "data_dir": "harmless-base"}
        (train, valid, test), _ = self.load(data=[own, prefs], test=True)
        self.assertEqual((len(train), len(valid), len(test)), (4 + 49, 2, 4))
        self.assertEqual(first_ids(train)[:4], [60, 61, 62, 63])
        self.assertEqual(first_ids(valid)[0], 70)
        self.assertEqual(self.calls[-1][2], {"data_dir": "harmless-base"})
        with self.assertRaisesRegex(ValueError, "needs a path"):
            self.load(data=[{"name": "x"}])
        # Of several, one that validates is enough.
        alone = {"path": "one/split"}
        for data, warnings in ([own, alone], 0), ([alone, alone], 1):
            _, output = self.load(data=data, valid_fraction=0)
            self.assertEqual(output.count("There is no validation set"), warnings)

    def test_named_splits(self):
        name = "Anthropic/hh-rlhf"
        splits = open_hub_splits(name, splits={"valid": "test_prefs"})
        self.assertEqual([len(splits[s]()) for s in ("train", "valid")], [50, 4])
        for name, spec in (
            (name, "train_prefs[-10%:]"),
            (name, "test_prefs+train_prefs[:5%]"),
            ("one/split", "default[:5%]"),
        ):
            with self.assertRaisesRegex(ValueError, "train_split"):
                open_hub_splits(name, splits={"valid": spec})


if __name__ == "__main__":
    unittest.main()
