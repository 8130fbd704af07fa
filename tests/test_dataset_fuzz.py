# Copyright © 2026 MLX Contributors

"""Random rows and files: the reader skips and counts, and never falls over."""

import contextlib
import copy
import gzip
import io
import json
import re
import tempfile
import unittest
from pathlib import Path

import numpy as np
import pyarrow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from test_preference_rows import SHAPES, WEBGPT
from tiny import bos_tokenizer
from tokenizers_for_tests import no_template_tokenizer

import mlx_lm
from mlx_lm.preference.data.published import joined
from mlx_lm.preference.data.sources import FileRows
from mlx_lm.preference.errors import InputError
from mlx_lm.tuner.datasets import PreferenceDataset

REFERENCE = Path(mlx_lm.__file__).with_name("DPO_REFERENCE.md").read_text("utf-8")
TURNS = "\n\nHuman: Is tea hot?\n\nAssistant: "
ASK = [{"role": "user", "content": "Is tea hot?"}]
YES, NO = ([{"role": "assistant", "content": text}] for text in ("Yes.", "No."))
# A row of every known shape.
ROWS: list[dict] = [
    *(row for _, row, _ in SHAPES),
    {
        "prompt": ASK,
        "chosen": YES,
        "rejected": [{"role": "assistant", "tool_calls": [{"name": "look"}]}],
        "tools": [{"function": {"name": "look"}}],
        "chat_template_kwargs": {"enable_thinking": True},
    },
    {"prompt": "Is tea hot?", "ranking": [" Yes.", " No.", " It is."]},
    {"prompt": ASK, "ranking": [YES, NO]},
    {"prompt": ASK, "criteria": {"true": {"chosen": YES, "rejected": NO}}},
    {
        "prompt": "Is tea hot?",
        "responses": [" Yes.", " No."],
        "criteria": {"true": [5, 1.5], "kind": 0},
    },
    {
        "instruction": "Is tea hot?",
        "completions": [
            {"response": "Yes.", "annotations": {"true": {"Rating": "5"}}},
            {"response": "No.", "annotations": {"true": {"Rating": "1"}}},
        ],
    },
    {"prompt": "Is tea hot?", "completion": " Yes.", "label": True},
    {"prompt": "Is ice hot?", "completion": " No.", "label": 1},
    {"prompt": ASK, "completion": NO, "label": False, "weight": 0.5, "margin": 1},
]

# And of every layout of a published set, as the reference shows it.
ROWS += [
    json.loads(line)
    for block in re.findall(r"^```json\n(.*?)^```", REFERENCE, re.M | re.S)
    for line in block.splitlines()
]

texts = st.one_of(
    st.text(st.characters(exclude_categories=[]), max_size=8),
    st.sampled_from(["", " ", "\n\nHuman:", f"{TURNS}Yes.", "</s>", "\0", "\ud83d"]),
    st.builds(str.__mul__, st.sampled_from(["a", "tea ", "é"]), st.just(3000)),
)
numbers = st.one_of(st.integers(), st.floats(), st.just(10**400), st.just(-(10**400)))
columns = st.sampled_from(
    sorted({name for row in ROWS for name in row} | {"role", "content", "value", "x"})
)
trees = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda parts: st.lists(parts, max_size=3)
    | st.dictionaries(columns | texts, parts, max_size=3),
    max_leaves=6,
)


def holders(value):
    """All objects and lists in a tree that hold something."""
    if isinstance(value, (dict, list)) and value:
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from holders(part)


@st.composite
def mutants(draw):
    """A row of a known shape, with up to three changes at any depth."""
    row = copy.deepcopy(draw(st.sampled_from(ROWS)))
    for _ in range(draw(st.integers(0, 3))):
        places = list(holders(row))
        if not places:
            break
        place = draw(st.sampled_from(places))
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        change = draw(st.sampled_from(["replace", "drop", "wrap", "rename", "repeat"]))
        if change == "drop":
            del place[key]
        elif change == "wrap":
            place[key] = [place[key]]
        elif change == "rename" and isinstance(place, dict):
            place[draw(columns)] = place.pop(key)
        elif change == "repeat" and isinstance(place, list):
            place.append(copy.deepcopy(place[key]))
        else:
            place[key] = draw(trees)
    return row


rows = st.one_of(mutants(), mutants(), trees, st.sampled_from(ROWS))
fuzz = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def deep(depth, content="x"):
    """Lists in lists, as JSON."""
    return "[" * depth + json.dumps(content) + "]" * depth


class TestFuzz(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.tokenizers = [bos_tokenizer(), no_template_tokenizer()]
        cls.rows = cls.used = 0

    def check(self, data, **options):
        """What was used and what was skipped is all that there was."""
        tokenizer = self.tokenizers[options.pop("tokenizer", 0)]
        # Neighbours may be answers to one prompt.
        total = sum(1 for _ in joined(data))
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                dataset = PreferenceDataset(
                    data, tokenizer, 128, max_bad_rows=1, **options
                )
            except ValueError as e:
                # Of the whole set, and said in a line; no row's own error.
                self.assertIs(type(e), InputError)
                self.assertRegex(
                    str(e),
                    rf"\A.* has no rows\.\Z|\A.*: no row of {total:,} can be .*\Z"
                    r"|\A.*: All rows have the same prompt\. .*\Z"
                    r"|\A.*: no row has the criterion '(true|kind)'\. .*\Z",
                )
                return 0
            self.assertEqual(dataset.num_rows, total)
            # A row may give several pairs, or copies.
            used = {dataset.source_row(i) for i in range(len(dataset))}
            self.assertEqual(len(used) + dataset.skipped.total(), total)
            self.assertEqual(dataset.select(range(len(dataset))).num_rows, len(used))
            self.assertEqual(len(dataset) % dataset.group_size, 0)
            for name, values in dataset.values.items():
                self.assertEqual(len(values), len(dataset))
                self.assertTrue(np.isfinite(values).all(), name)
            weights = dataset.values.get("weights", np.ones(1))
            # Copies fill short rankings up.
            copies = dataset.kind == "rankings"
            self.assertTrue((weights >= 0 if copies else weights > 0).all())
            self.assertEqual(dataset.skipped.keys(), dataset.first_skipped.keys())
            for line in dataset.summary():
                self.assertTrue(line.isprintable(), line)
            dataset.preview().encode()
        for prompt, chosen, rejected, lengths in dataset:
            self.assertLess(len(prompt), 128)
            self.assertTrue(len(chosen) and len(rejected))
            self.assertLessEqual(max(lengths), 128)
        type(self).rows += total
        type(self).used += len(dataset)
        return len(dataset)

    @fuzz
    @given(
        data=st.lists(rows, max_size=30),
        transcripts=st.sampled_from(["turns", "raw"]),
        tokenizer=st.integers(0, 1),
    )
    def test_rows(self, data, transcripts, tokenizer):
        self.check(data, transcripts=transcripts, tokenizer=tokenizer)

    @fuzz
    @given(
        data=st.lists(rows, max_size=30),
        options=st.sampled_from(
            [
                {"kind": "labels"},
                {"kind": "labels", "weight_feature": "weight"},
                {"kind": "rankings"},
                {"kind": "rankings", "weight_feature": "score_0"},
                {"criteria": {"true": 0.5, "kind": 2}},
                {"criteria": {"true": 1}, "margin_feature": "margin"},
                {"weight_feature": "weight", "margin_feature": "score_1"},
            ]
        ),
        tokenizer=st.integers(0, 1),
    )
    def test_labelled_rows(self, data, options, tokenizer):
        self.check(data, tokenizer=tokenizer, **options)

    @fuzz
    @given(data=st.lists(rows, max_size=12), names=st.tuples(*[columns] * 3))
    def test_options(self, data, names):
        features = ("prompt_feature", "chosen_feature", "rejected_feature")
        self.check(data, wrap_text=True, **dict(zip(features, names)))

    @fuzz
    @given(data=st.data())
    def test_files(self, data):
        parts = data.draw(
            st.lists(
                st.one_of(
                    st.binary(max_size=12),
                    rows.map(lambda row: json.dumps(row).encode()),
                    rows.map(lambda row: json.dumps(row).encode()[:-2]),
                ),
                max_size=12,
            )
        )
        raw = data.draw(st.sampled_from([b"\n", b"\r\n", b",", b"\n\n"])).join(parts)
        text = raw.removeprefix(b"\xef\xbb\xbf")
        plain = text.lstrip()[:1] not in b"[{"
        if data.draw(st.integers(0, 3)) == 0:
            raw, plain = gzip.compress(raw, mtime=0), False
        if data.draw(st.booleans()) and raw:
            # A byte that is another one.
            at = data.draw(st.integers(0, len(raw) - 1))
            raw = raw[:at] + bytes([data.draw(st.integers(0, 255))]) + raw[at + 1 :]
            plain = False
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / data.draw(
                st.sampled_from(["train.jsonl", "train.json", "train.parquet"])
            )
            path.write_bytes(raw)
            try:
                found = FileRows([path])
                len(found)  # Reads them.
            except ValueError as e:
                self.assertIs(type(e), InputError)
                self.assertRegex(str(e), r"\A.*train\.(jsonl?|parquet).*\Z")
                return
            if plain:
                lines = [line for line in text.split(b"\n") if line.strip()]
                self.assertEqual(len(found), len(lines))
            self.check(found)

    def test_parquet(self):
        good = [{**ROWS[0], "chosen": f"Yes, {i}."} for i in range(20)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "train.parquet"
            table = pyarrow.Table.from_pylist(good)
            parquet.write_table(table, path, compression="none")
            raw = path.read_bytes()
            path.write_bytes(raw.replace(b"Yes, 7", b"Yes\xff 7"))
            found = FileRows([path])
            self.assertEqual(self.check(found), 19)
            self.assertEqual(found[7].reason, "invalid UTF-8")
            self.assertEqual(found.location(7), "train.parquet:8")
            random = np.random.RandomState(0)
            for at, byte in zip(random.permutation(len(raw))[:200], random.bytes(200)):
                path.write_bytes(raw[:at] + bytes([byte]) + raw[at + 1 :])
                try:
                    found = FileRows([path])
                    len(found)  # Reads them.
                except ValueError as e:
                    self.assertIs(type(e), InputError)
                    self.assertRegex(str(e), r"\A.*train\.parquet.*\Z")
                    continue
                self.check(found)

    def test_depth(self):
        # Around the depth that Python's parser can take, and its stack cannot.
        good = json.dumps(ROWS[1])
        lines = [good]
        for depth in [*range(900, 1000), 10_000, 100_000]:
            call = f'{{"role": "assistant", "tool_calls": {deep(depth)}}}'
            other = call.replace('"x"', '"y"')
            ask = json.dumps(ASK)
            lines += [
                f'{{"prompt": {ask}, "chosen": [{call}], "rejected": [{other}]}}',
                f'{{"prompt": {deep(depth)}, "chosen": "a", "rejected": "b"}}',
            ]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "train.jsonl"
            path.write_text("\n".join(lines))
            found = FileRows([path])
            len(found)  # Reads them.
        self.assertEqual(len(found), len(lines))
        self.assertGreaterEqual(self.check(found), 1)

    def test_depth_that_no_file_has(self):
        calls = []
        for content in "xy":
            for _ in range(5000):
                content = [content]
            calls.append([{"role": "assistant", "tool_calls": content}])
        row = {"prompt": ASK, "chosen": calls[0], "rejected": calls[1]}
        self.assertEqual(self.check([row, ROWS[1]]), 1)

    def test_large_numbers(self):
        row = {**WEBGPT, "score_0": 10**400}
        nan = {**row, "score_1": float("nan")}
        self.assertEqual(self.check([row, nan]), 1)


if __name__ == "__main__":
    unittest.main()
