# Copyright © 2026 MLX Contributors

"""Rows that people have, through the command: read as their author meant, or refused.

What is right comes from the tokenizer alone: the ids that ``mlx_lm.generate`` makes of a
conversation written out by hand.
"""

import json
import re
import unittest
from unittest import mock

import mlx.core as mx
from published_layouts import LAYOUTS
from row_cases import (
    BAD,
    GOOD,
    TWO,
    WORDS,
    Case,
    answered,
    asks,
    assistant,
    each,
    system,
    tool,
    user,
)
from test_dpo_command import CommandCase, command, metrics_of
from test_folder_lock import taken
from tiny import save_tiny_model

from mlx_lm import dpo
from mlx_lm.preference.run import forecast
from mlx_lm.preference.run.forecast import check_memory
from mlx_lm.tokenizer_utils import load as load_tokenizer

CASES = [
    Case(
        1,
        "instruction and input of LLaMA-Factory",
        asks(instruction="Describe a *.", input=""),
        answered(user("Describe a *.")),
        says=r"prompt: instruction",
    ),
    Case(
        1,
        "instruction, input, system and history",
        [
            {**row, "history": [["Hi", "Hello"]]}
            for row in asks(instruction="Describe it.", input="A *.", system="Be dry.")
        ],
        answered(
            system("Be dry."),
            user("Hi"),
            assistant("Hello"),
            user("Describe it.\nA *."),
        ),
        says=r"prompt: instruction, input, history .* system: system",
    ),
    Case(
        1,
        "system and input",
        asks(system="Be dry.", input="Describe a *."),
        answered(system("Be dry."), user("Describe a *.")),
    ),
    Case(1, "query", asks(query="A *?"), answered(user("A *?"))),
    Case(
        1,
        "trajectory",
        each(lambda w: {**TWO, "trajectory": [{"from": "user", "value": w}]}),
        each(lambda w: ([user(w)], GOOD, BAD)),
    ),
    Case(
        1,
        "question and context",
        asks(question="A *?", context="About * and more."),
        answered(user("A *?")),
        says=r"Columns with text that are not read: 'context'\.",
    ),
    Case(
        1,
        "a column of another name",
        asks(goal="Describe a *."),
        refused=r"no prompt.* set prompt_feature if it is 'goal'",
    ),
    Case(
        1,
        "messages in a column of another name",
        each(lambda w: {"talk": [user(w)], "chosen": GOOD, "rejected": BAD}),
        refused=r"no common prompt .* set prompt_feature if it is 'talk'",
    ),
    Case(
        1,
        "a column of another name, answers that begin alike",
        each(
            lambda w: {
                "goal": f"Please describe a {w}.",
                "chosen": "A small thing.",
                "rejected": "A dull thing.",
            }
        ),
        each(lambda w: ("A", " small thing.", " dull thing.")),
        says=r"\[WARNING\] In 4 rows the prompt is only .* 'goal' is not read",
    ),
    Case(
        1,
        "an empty prompt beside text",
        asks(prompt="", notes="A long *."),
        each(lambda w: ("", *TWO.values())),
        says=r"\[WARNING\] In 4 rows the prompt is empty, while 'notes' is not read",
    ),
    Case(
        2,
        "answers bring the system turn along",
        each(
            lambda w: {
                "prompt": [user(w)],
                "chosen": [system("S"), user(w), *GOOD],
                "rejected": [system("S"), user(w), *BAD],
            }
        ),
        each(lambda w: ([system("S"), user(w)], GOOD, BAD)),
    ),
    Case(
        2,
        "answers repeat the question, not the system turn",
        each(
            lambda w: {
                "prompt": [system("S"), user(w)],
                "chosen": [user(w), *GOOD],
                "rejected": [user(w + " "), *BAD],
            }
        ),
        each(lambda w: ([system("S"), user(w)], GOOD, BAD)),
    ),
    Case(
        2,
        "only one answer repeats the prompt",
        each(
            lambda w: {
                "prompt": [user(w)],
                "chosen": [user(w), *GOOD],
                "rejected": BAD,
            }
        ),
        each(lambda w: ([user(w)], GOOD, BAD)),
    ),
    Case(
        2,
        "turns with other keys",
        each(
            lambda w: {
                "prompt": w,
                "chosen": [{**user(w), "id": "1"}, *GOOD],
                "rejected": [{**user(w), "id": "2"}, *BAD],
            }
        ),
        each(lambda w: ([user(w)], GOOD, BAD)),
    ),
    Case(
        2,
        "answers to another prompt",
        each(
            lambda w: {
                "prompt": [user(w)],
                "chosen": [user("Else?"), *GOOD],
                "rejected": [user("Else?"), *BAD],
            }
        ),
        refused=r"answer to another prompt .* an answer begins with a user turn",
    ),
    Case(
        9,
        "messages as JSON text",
        each(
            lambda w: {
                "prompt": json.dumps([user(w)]),
                "chosen": json.dumps(GOOD),
                "rejected": json.dumps(BAD[0]),
            }
        ),
        each(lambda w: ([user(w)], GOOD, BAD)),
    ),
    Case(
        9,
        "conversations as Python prints them",
        each(
            lambda w: {
                "chosen": str([user(w), *GOOD]),
                "rejected": str([user(w), *BAD]),
            }
        ),
        each(lambda w: ([user(w)], GOOD, BAD)),
    ),
    Case(
        9,
        "messages as text that nobody can parse",
        each(lambda w: {"prompt": w, **TWO, "chosen": str(GOOD)[:-3]}),
        refused=r"messages are no JSON .*chosen",
    ),
    Case(
        10,
        "whole transcripts beside their prompt",
        each(
            lambda w: {
                "prompt": f"\n\nHuman: A {w}?\n\nAssistant:",
                "chosen": f"\n\nHuman: A {w}?\n\nAssistant: A small thing.",
                "rejected": f"\n\nHuman: A {w}?\n\nAssistant: I can't, dull.",
            }
        ),
        answered(user("A *?")),
    ),
    Case(
        10,
        "text answers that repeat the prompt",
        each(
            lambda w: {
                "prompt": f"Describe a {w}.",
                "chosen": f"Describe a {w}. It is small.",
                "rejected": f"Describe a {w}. Never.",
            }
        ),
        each(lambda w: (f"Describe a {w}.", " It is small.", " Never.")),
        says=r"In 4 rows both answers repeated the prompt, .* train\.jsonl:1",
    ),
    Case(
        12,
        "a conversation that holds the answer",
        each(
            lambda w: {
                "conversations": [
                    {"from": "human", "value": w},
                    {"from": "gpt", "value": "A small thing."},
                ],
                "chosen": {"from": "gpt", "value": "A small thing."},
                "rejected": {"from": "gpt", "value": "I can't, dull."},
            }
        ),
        each(lambda w: ([user(w)], GOOD, BAD)),
        says=r"In 4 rows the prompt ended with an answer, .* train\.jsonl:1",
    ),
    Case(
        12,
        "a conversation that holds a third answer",
        each(lambda w: {"messages": [user(w), assistant("Hm.")], **TWO}),
        refused="the prompt ends with an answer, neither chosen nor rejected",
    ),
    Case(
        15,
        "one Parquet file of several shapes",
        [
            {"prompt": [user("tea")], "chosen": GOOD, "rejected": BAD},
            {"question": "hat", "chosen": GOOD, "rejected": BAD},
            {"chosen": [user("pen"), *GOOD], "rejected": [user("pen"), *BAD]},
            {"messages": [user("cup"), *GOOD], "rejected": BAD},
        ],
        each(lambda w: ([user(w)], GOOD, BAD)),
        suffix=".parquet",
    ),
    *(
        Case(
            16,
            f"turns that both answers share, {name}",
            each(
                lambda w, start=start: {
                    "prompt": start(w),
                    "chosen": [assistant("Yes."), user("So?"), *GOOD],
                    "rejected": [assistant("Yes."), user("So?"), *BAD],
                }
            ),
            each(lambda w: ([user(w), assistant("Yes."), user("So?")], GOOD, BAD)),
        )
        for name, start in (("messages", lambda w: [user(w)]), ("text", str))
    ),
    Case(
        16,
        "turns of users and tools within an answer",
        each(
            lambda w: {
                "prompt": w,
                "chosen": [assistant("Hm."), tool("7"), *GOOD],
                "rejected": [assistant("Well."), user("So?"), *BAD],
            }
        ),
        each(
            lambda w: (
                [user(w)],
                [assistant("Hm."), tool("7"), *GOOD],
                [assistant("Well."), user("So?"), *BAD],
            )
        ),
    ),
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


MARKED = [
    row | {"split": split}
    for row, split in zip(PLAIN, ["train", "validation", "train", "train"])
]


def file(name, content, suffix=".jsonl", refused="", says="."):
    """A case of a whole file; what is read of it is the same."""
    pairs = each(lambda w: (f"Say {w}.", w, f"no {w}"))
    return Case(17, name, content, pairs, says, refused=refused, suffix=suffix)


FILES = [
    file("CSV", TABLE, ".csv"),
    file("UTF-16", TEXTS.encode("utf-16")),
    file("pretty-printed", TEXTS.replace(", ", ",\n  ")),
    file("save_to_disk", PLAIN, "/"),
    file(
        "rows of two splits",
        MARKED,
        says="The column 'split' says 'train' in 3, 'validation' in 1 of the rows, and "
        "all are read: keep those of each split in a file of its own",
    ),
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
    estimates: list = []

    def test_cases(self):
        for case in [*CASES, *LAYOUTS, *FILES]:
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

    def check_memory(self, *args):
        # The slowest part of a plan, and the same for all cases.
        if not self.estimates:
            self.estimates.append(check_memory(*args))
        return self.estimates[0]

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
        patched = mock.patch.multiple(forecast, check_memory=self.check_memory)
        with mock.patch.object(dpo.setup, "load_data", load), patched:
            code, out, err = command(
                *("--model", model, "--data", data, "--adapter-path", self.adapters),
                *("--train", "--dry-run", "--batch-size", 2, "--num-layers", 1),
                *("--no-token-cache", "--max-seq-length", 2048),
                *case.flags,
            )
        # Lines are as wide as a terminal, and stand in a panel.
        return (
            code,
            " ".join(out.replace("│", " ").split()),
            err,
            loaded[0] if loaded else None,
        )

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

            names = dict.fromkeys(name for row in rows for name in row)
            columns = {name: [row.get(name) for row in rows] for name in names}
            parquet.write_table(pyarrow.table(columns), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    @staticmethod
    def shown(tokenizer, part):
        if not isinstance(part, list):
            return part
        return tokenizer.decode([t if t >= 0 else ~t for t in part])

    @staticmethod
    def ids(tokenizer, prompt, *answers, tools=None):
        """What mlx_lm.generate makes of a prompt, and what the template writes after."""
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
        found = [x if isinstance(x, float) else x[len(start) :] for x in whole]
        for ids, answer in zip(found, answers if isinstance(prompt, list) else ()):
            if isinstance(answer, list) and len(answer) == 3:
                # Of the turn between, and what begins the last one, nobody scores a token.
                ends = [
                    len(render(prompt + answer[:n], add_generation_prompt=n == 2))
                    for n in (1, 2)
                ]
                first, end = (n - len(start) for n in ends)
                ids[first:end] = [~token for token in ids[first:end]]
        return start, *found


class TestRuns(CommandCase):
    def test_13_two_runs_in_one_folder(self):
        self.succeed(*self.flags("--iters", 1))
        config = (self.adapters / "adapter_config.json").read_bytes()
        with taken(self.adapters):
            for argv in (self.flags("--beta", 0.3), ["--resume", self.adapters]):
                code, _, err = command(*argv)
                self.assertEqual(code, 2)
                self.assertRegex(err, r"\AError: .* in use by another run, .*\n\Z")
        self.assertEqual((self.adapters / "adapter_config.json").read_bytes(), config)

    def test_14_steps_that_were_all_skipped(self):
        model = save_tiny_model(self.folder / "half")
        weights = mx.load(str(model / "model.safetensors"))
        # Far more than float16 holds, once multiplied.
        large = {k: (x * 1e4).astype(mx.float16) for k, x in weights.items()}
        mx.save_safetensors(str(model / "model.safetensors"), large, {"format": "mlx"})
        more = ("--model", model, "--steps-per-report", 1)
        code, out, err = command(*self.flags(*more, "--iters", 2))
        self.assertEqual(code, 1)
        self.assertRegex(err, "Nothing was trained: .* not the learning rate's fault")
        lines = [x for x in metrics_of(self.adapters) if "train_loss" in x]
        self.assertEqual([line["skipped_steps"] for line in lines], [1, 2])
        for name in ("loss", "perplexity/policy", "rewards/accuracies", "grad_norm"):
            self.assertEqual([line[name] for line in lines], [None, None], name)
        self.assertRegex(out, r"\n +1 +- +- +- ")
        code, _, err = command(*self.flags(*more, "--iters", 20))
        self.assertEqual(code, 1)
        self.assertRegex(err, "not the learning rate's fault: float16 ends at 65,504")


if __name__ == "__main__":
    unittest.main()
