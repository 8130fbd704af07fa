# Copyright © 2026 MLX Contributors

"""Rows that people have, through the command: read as their author meant, or refused.

What is right comes from the tokenizer alone: the ids that ``mlx_lm.generate`` makes of a
conversation written out by hand.
"""

import json
import re
import unittest
from dataclasses import dataclass
from unittest import mock

from test_dpo_command import CommandCase, command
from tiny import save_tiny_model

from mlx_lm import dpo
from mlx_lm.tokenizer_utils import load as load_tokenizer

WORDS = ("tea", "hat", "pen", "cup")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def tool(text):
    return {"role": "tool", "content": text}


def each(make):
    """A row, or what is right for it, of every word."""
    return [make(word) for word in WORDS]


@dataclass
class Case:
    """Rows as people have them, and what the command makes of them."""

    number: int
    name: str
    rows: list | str | bytes
    # Prompt, chosen and rejected of every pair, as messages or as text; with labels
    # the third is the label.
    pairs: list | None = None
    says: str = ""
    refused: str = ""
    flags: tuple = ()
    template: str | None = None
    suffix: str = ".jsonl"


CASES = [
    Case(
        18,
        "all answers desired",
        each(lambda w: {"prompt": [user(w)], "completion": f"A {w}.", "label": True}),
        pairs=each(lambda w: ([user(w)], [assistant(f"A {w}.")], 1.0)),
        says=r"\[WARNING\] All 4 answers have the label 1, .*\.",
        flags=("--loss-type", "kto"),
    ),
]

PLAIN = each(lambda w: {"prompt": f"Say {w}.", "chosen": w, "rejected": f"no {w}"})
TEXTS = "".join(json.dumps(row) + "\n" for row in PLAIN)
TABLE = "prompt,chosen,rejected\n" + "".join(f"Say {w}.,{w},no {w}\n" for w in WORDS)


def file(name, content, suffix=".jsonl", refused=""):
    """A case of a whole file; what is read of it is the same."""
    pairs = each(lambda w: (f"Say {w}.", w, f"no {w}"))
    return Case(17, name, content, pairs, refused=refused, suffix=suffix)


FILES = [
    file("CSV", TABLE, ".csv"),
    file("UTF-16", TEXTS.encode("utf-16")),
    file("pretty-printed", TEXTS.replace(", ", ",\n  ")),
    file("save_to_disk", PLAIN, "/"),
    file(
        "trailing comma",
        f"[{TEXTS.replace('}', '},')}]",
        ".json",
        refused=r"\AError: Can't read .*/train.json: unreadable JSON, .*: line 5 col.*\n\Z",
    ),
    file(
        "not JSON",
        "tea;hat\n",
        refused=r"holds no JSON object \(train.jsonl:1: unreadable JSON, Expecting value: ",
    ),
    file(
        "NaN",
        TEXTS.replace('"no tea"', "NaN"),
        refused=r"1 of 4 rows are bad.* value is NaN \(first: train.jsonl:1, rejected\)",
    ),
]


class TestReportedRows(CommandCase):
    def test_cases(self):
        for case in [*CASES, *FILES]:
            with self.subTest(row=case.number, name=case.name):
                self.check(case)

    def check(self, case):
        model = self.model
        if case.template is not None:
            model = save_tiny_model(self.folder / f"{case.number} {case.name}")
            (model / "chat_template.jinja").write_text(case.template)
        code, out, err, dataset = self.read(case, model)
        if case.refused:
            self.assertEqual(code, 2, err + out)
            self.assertRegex(err, case.refused)
            return
        self.assertEqual(code, 0, err)
        self.assertIsNotNone(re.search(case.says, out), out)
        tokenizer = load_tokenizer(model)
        found = []
        for i, (prompt, chosen, rejected, _) in enumerate(dataset):
            third = rejected.tolist()
            if dataset.kind == "labels":
                third = dataset.values["labels"][i]
            found.append((prompt.tolist(), chosen.tolist(), third))
        texts = [[self.shown(tokenizer, part) for part in pair] for pair in found]
        right = [self.ids(tokenizer, *pair) for pair in case.pairs]
        self.assertEqual(found, right, texts)

    def read(self, case, model):
        """Plan a run on the rows: exit code, both outputs and the training set."""
        data = self.folder / f"data {case.number} {case.name}"
        data.mkdir()
        for name in ("train", "valid"):
            self.write(data / f"{name}{case.suffix}", case.rows)
        if case.suffix == "/":
            (data / "dataset_dict.json").write_text('{"splits": ["train", "valid"]}')
        loaded = []

        def load(*args):
            loaded.extend(load_data(*args))
            return loaded

        load_data = dpo.setup.load_data
        with mock.patch.object(dpo.setup, "load_data", load):
            code, out, err = command(
                *("--model", model, "--data", data, "--adapter-path", self.adapters),
                *("--train", "--dry-run", "--batch-size", 2, "--num-layers", 1),
                *("--no-token-cache", "--max-seq-length", 2048),
                *case.flags,
            )
        # Lines are as wide as a terminal.
        return code, " ".join(out.split()), err, loaded[0] if loaded else None

    @staticmethod
    def write(path, rows):
        if isinstance(rows, (str, bytes)):
            path.write_bytes(rows.encode() if isinstance(rows, str) else rows)
        elif not path.suffix:
            import datasets

            datasets.disable_progress_bars()

            datasets.Dataset.from_list(rows).save_to_disk(str(path))
        elif path.suffix == ".parquet":
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    @staticmethod
    def shown(tokenizer, part):
        return tokenizer.decode(part) if isinstance(part, list) else part

    @staticmethod
    def ids(tokenizer, prompt, *answers, tools=None):
        """What mlx_lm.generate makes of the prompt, and the template of the rest."""
        if isinstance(prompt, str):
            start = tokenizer.encode(prompt)
            whole = [
                tokenizer.encode(prompt + a + tokenizer.eos_token) for a in answers
            ]
        else:
            render = tokenizer.apply_chat_template
            start = render(prompt, tools=tools, add_generation_prompt=True)
            whole = [
                a if isinstance(a, float) else render(prompt + a, tools=tools)
                for a in answers
            ]
        return start, *(
            ids if isinstance(ids, float) else ids[len(start) :] for ids in whole
        )


if __name__ == "__main__":
    unittest.main()
