# Copyright © 2026 MLX Contributors

"""One conversation has one meaning, whatever shape and file it is written in.

The prompt is what mlx_lm.server makes of the conversation. What is scored is written
down beside each family's template.
"""

import contextlib
import copy
import csv
import io
import json
import tempfile
import unittest
from pathlib import Path

import datasets as hf
import pyarrow
from fixtures.chat_families import FAMILIES
from pyarrow import parquet
from row_cases import assistant, system, user

from mlx_lm.server import process_message_content
from mlx_lm.tuner.datasets import PreferenceDataset, load_preference_dataset


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    calls = [{"id": "c1", "type": "function", "function": function}]
    return assistant("", tool_calls=calls)


def tool(name, **properties):
    kinds = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": kinds}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def talk(prompt, chosen="Yes, it is.", rejected="No.", **more):
    """A conversation with two answers."""
    answers = [assistant(a) if isinstance(a, str) else a for a in (chosen, rejected)]
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], **more}


SAID = [
    ("Is tea hot?", "Yes.", "No."),
    ("", "Hello!", "What?"),
    ("grün, 茶, 🍵, שלום, e\u0301", "茶 is tea 🍵.", "Grün ist die Hoffnung…"),
    ("  two  spaces  ", " a space first", "a space last "),
    ("\n\nA list:\n1. a\n\n", "\n\n1. b\n", "\n1. c"),
    ("{{ bos_token }}{% if x %}", "{'role': 'user'}", "[INST]"),
    ('{"a": [1, null]}', '{"b": "\\u00e9"}', "<b>&amp;</b>"),
    ("a", "a" * 300, "a" * 299 + "b"),
]
PLAIN = [talk([user(q)], a, b) for q, a, b in SAID]
SYSTEMS = [
    talk([system(s), user(q)], a, b)
    for s in ("Answer in French.", "Sei kurz.\n\nIch bin müde.")
    for q, a, b in SAID
]
LONGER = [
    talk([user(q), assistant(a), user(b)], f"{a} Or not?", f"{b} {q}")
    for q, a, b in SAID[:5]
] + [
    talk([system("Be kind."), user("a"), assistant("b"), user("c")]),
    talk([user("a"), assistant("b"), user("c"), assistant("d"), user("e")]),
    talk(
        [system("x"), user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    ),
    # Those that some templates refuse, and a late system text.
    talk([user("a"), user("b")]),
    talk([user("a"), system("Be short."), user("b")]),
    talk([user("a"), assistant("b"), system("Be short."), user("c")]),
    talk([assistant("Hello, I am a teapot."), user("Are you?")]),
]
SWITCHED = [
    {**x, "chat_template_kwargs": {"enable_thinking": on}}
    for x in (PLAIN[0], SYSTEMS[0], LONGER[0])
    for on in (True, False)
] + [talk([system("/no_think"), user("Is tea hot?")])]
THOUGHT = "<think>\nHm, well.\n</think>\n\n"
THINKING = [
    talk([user("Is tea hot?")], f"{THOUGHT}Yes.", "<think>\n\n</think>\n\nNo."),
    talk([user("Is tea hot?")], f"{THOUGHT}\n\nYes.", f"{THOUGHT}Yes."),
    talk([system("Think."), user("a")], f"{THOUGHT}Yes.", f"{THOUGHT}No."),
    talk(
        [user("a"), assistant(f"{THOUGHT}b"), user("c")],
        f"{THOUGHT}Yes.",
        f"{THOUGHT}No.",
    ),
    talk([user("a"), assistant(f"{THOUGHT}b"), user("c")]),
]
REASONED = [
    talk([user("a")], assistant("b", reasoning_content="Why not?"), "c"),
    talk(
        [user("a"), assistant("b", reasoning_content="So."), user("c")],
        assistant("d", reasoning_content="Why not?"),
        assistant("d", reasoning_content="Well."),
    ),
]
TOOLS = [tool("clock"), tool("order", what="string", many="integer")]
CALLED = call("order", what="tea", many=2)
TOOLED = [
    talk([user("Tea!")], CALLED, call("order", what="hat"), tools=TOOLS),
    talk([user("Tea!")], CALLED, "No.", tools=TOOLS[1:]),
    talk([system("Be quick."), user("Time?")], call("clock"), CALLED, tools=TOOLS),
    talk(
        [
            user("Tea!"),
            CALLED,
            {"role": "tool", "content": '{"cups": 2}', "tool_call_id": "c1"},
        ],
        "Here it is.",
        "There is none.",
        tools=TOOLS,
    ),
]
CONVERSATIONS = [
    *(PLAIN + SYSTEMS + LONGER + SWITCHED + THINKING + REASONED + TOOLED),
]


def parts(message):
    """Content in parts."""
    text = message["content"]
    pieces = [{"type": "text", "text": x} for x in (text[:3], text[3:])]
    return {**message, "content": pieces}


def padded(message):
    """All the fields that an Arrow table has, and arguments as text."""
    calls = [
        {**x, "function": {**x["function"], "arguments": json.dumps(arguments)}}
        for x in message.get("tool_calls", [])
        for arguments in [x["function"]["arguments"]]
    ]
    nulls = dict.fromkeys(("name", "tool_calls", "from", "value", "reasoning_content"))
    more = {"tool_calls": calls, "content": None} if calls else {}
    return {**nulls, **message, **more}


NAMES = {"user": "Human", "assistant": "gpt", "system": "System", "tool": "observation"}


def renamed(message):
    return {**message, "role": NAMES[message["role"]]}


def sharegpt(message):
    return {"from": NAMES[message["role"]].lower(), "value": message["content"]}


def shapes(conversation):
    """Every way to write a conversation, by name."""
    x = {k: v for k, v in conversation.items() if k not in ("chosen", "rejected")}
    prompt = x.pop("prompt")
    good, bad = conversation["chosen"], conversation["rejected"]

    def of(change):
        return {
            "prompt": [change(m) for m in prompt],
            "chosen": [change(good)],
            "rejected": [change(bad)],
            **x,
        }

    yield "messages", of(lambda m: m)
    yield "parts", of(parts)
    yield "nulls", {
        **of(padded),
        "tools": json.dumps(x["tools"]) if "tools" in x else None,
        "chat_template_kwargs": json.dumps(x.get("chat_template_kwargs")),
    }
    yield "names", of(renamed)
    yield "one message", {"prompt": prompt, "chosen": good, "rejected": bad, **x}
    whole = {"chosen": [*prompt, good], "rejected": [*prompt, bad], **x}
    yield "whole", {"prompt": prompt, **whole}
    yield "shared", whole
    yield "messages and rejected", {"messages": [*prompt, good], "rejected": [bad], **x}
    yield "both whole", {
        "messages": whole["chosen"],
        "rejected": whole["rejected"],
        **x,
    }
    yield "ranking", {"prompt": prompt, "ranking": [[good], [bad]], **x}
    told = (
        {"messages": prompt, "tools": x["tools"]}
        if "tools" in x
        else {"messages": prompt}
    )
    more = {k: v for k, v in x.items() if k != "tools"}
    outputs = {"preferred_output": [good], "non_preferred_output": [bad]}
    yield "OpenAI", {"input": told, **outputs, **more}
    yield "ms-swift", {"messages": [*prompt, good], "rejected_response": [bad], **x}
    yield "JSON text", {
        **{"prompt": json.dumps(prompt), "chosen": json.dumps([good])},
        **{"rejected": json.dumps([bad]), **x},
    }
    ranked = [{"rank": 1, "completion": [bad]}, {"rank": 0, "completion": [good]}]
    yield "NeMo", {"context": prompt, "completions": ranked, **x}
    choice = {"chosen": [good], "rejected": [bad]}
    yield "criteria", {"prompt": prompt, "criteria": {"better": choice}, **x}
    if all(m.keys() == {"role", "content"} for m in [*prompt, good, bad]):
        said = good["content"], bad["content"]
        texts = dict(zip(("chosen", "rejected"), said))
        yield "text answers", {"prompt": prompt, **texts, **x}
        yield "sharegpt", {
            "conversations": [sharegpt(m) for m in prompt],
            "chosen": sharegpt(good),
            "rejected": sharegpt(bad),
            **x,
        }
        first = prompt[0]["content"]
        if [m["role"] for m in prompt] == ["user"]:
            yield "conversations", {"prompt": first, **whole}
            yield "SHP", {
                **{"history": first, "human_ref_A": said[1], "human_ref_B": said[0]},
                "labels": 0,
                **x,
            }
            scores = {"score_0": 1.0, "score_1": -1.0}
            answers = {"answer_0": said[0], "answer_1": said[1]}
            yield "WebGPT", {"question": first, **answers, **scores, **x}
        if [m["role"] for m in prompt] == ["system", "user"]:
            question = {"question": prompt[1]["content"]}
            yield "Orca", {"system": first, **question, **texts, **x}
        if prompt[0]["role"] == "system":
            yield "system column", {
                **{"prompt": prompt[1:], "system": first},
                "chosen": [good],
                "rejected": [bad],
                **x,
            }


def served(tokenizer, conversation):
    """The prompt as mlx_lm.server gives it to the model, None where it refuses."""
    messages = copy.deepcopy(conversation["prompt"])
    process_message_content(messages)
    kwargs = conversation.get("chat_template_kwargs", {})
    try:
        return tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tools=conversation.get("tools"),
            **kwargs,
        )
    except Exception:
        return None


def expected(family, tokenizer, conversation):
    """Prompt and answers that are right, None where they can't be."""
    prompt = served(tokenizer, conversation)
    if prompt is None:
        return None
    answers = [conversation["chosen"], conversation["rejected"]]
    given = tokenizer.decode(prompt)
    opened = given.rfind("<think>") > given.rfind("</think>")
    if opened and not all("</think>" in m["content"] for m in answers):
        return None
    closed = given.rstrip().endswith("<think></think>") or given.endswith(
        "<think>\n\n</think>\n\n"
    )
    texts = [family.answer(m) for m in answers]
    if closed:
        texts = [after_thought(text) for text in texts]
    # To a template that drops thoughts, answers may be the same.
    return (given, *texts) if texts[0] != texts[1] else None


def after_thought(text):
    return text.rpartition("</think>")[2].removeprefix("\n\n")


def meanings(dataset, tokenizer):
    """Prompt and answers of each row, by its place."""
    return {
        dataset.source_row(i): tuple(tuple(part.tolist()) for part in dataset[i][:3])
        for i in range(len(dataset))
    }


class TestFamilies(unittest.TestCase):
    def test_every_shape_means_what_the_server_makes_of_it(self):
        for name, family in FAMILIES.items():
            with self.subTest(family=name):
                self.check(family)

    def check(self, family):
        tokenizer = family.tokenizer()
        fits = [x for x in CONVERSATIONS if family.tools or "tools" not in x]
        rows = [(i, *named) for i, x in enumerate(fits) for named in shapes(x)]
        dataset = PreferenceDataset(
            [row for _, _, row in rows],
            tokenizer,
            max_bad_rows=1,
            criteria={"better": 1.0},
        )
        found = meanings(dataset, tokenizer)
        right = [expected(family, tokenizer, x) for x in fits]
        prompts = [served(tokenizer, x) for x in fits]
        for place, (i, shape, _) in enumerate(rows):
            ids = found.get(place)
            with self.subTest(shape=shape, conversation=fits[i]):
                self.assertEqual(ids is None, right[i] is None, right[i])
                if ids is not None:
                    self.assertEqual(list(ids[0]), prompts[i], tokenizer.decode(ids[0]))
                    texts = tuple(tokenizer.decode(part) for part in ids)
                    self.assertEqual(texts, right[i])


def write_table(path, rows):
    """A file or folder of the kind that its name says."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.table(columns), path)
    elif path.suffix == ".csv":
        text = lambda x: x if x is None or isinstance(x, str) else json.dumps(x)
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(names))
            table.writeheader()
            for row in rows:
                table.writerow({name: text(x) for name, x in row.items()})
    else:
        hf.disable_progress_bars()
        hf.Dataset.from_dict(columns).save_to_disk(path)


class TestFiles(unittest.TestCase):
    def test_every_file_means_the_same(self):
        tokenizer = FAMILIES["qwen3"].tokenizer()
        by_shape = {}
        for conversation in CONVERSATIONS:
            for shape, row in shapes(conversation):
                by_shape.setdefault(shape, []).append(row)
        for shape, rows in by_shape.items():
            right = self.load(rows, tokenizer, "train.jsonl")
            for name in ("train.json", "train.parquet", "train.csv", "saved"):
                with self.subTest(shape=shape, file=name):
                    self.assertEqual(self.load(rows, tokenizer, name), right)

    def load(self, rows, tokenizer, name):
        """The pairs of rows that went through a file."""
        with tempfile.TemporaryDirectory() as folder:
            write_table(path := Path(folder) / name, rows)
            with contextlib.redirect_stdout(io.StringIO()):
                train, *_ = load_preference_dataset(
                    str(path if name == "saved" else folder),
                    tokenizer,
                    valid_fraction=0,
                    max_bad_rows=1,
                    criteria={"better": 1.0} if "criteria" in rows[0] else None,
                )
            return [tuple(x.tolist() for x in pair[:3]) for pair in train], len(rows)


if __name__ == "__main__":
    unittest.main()
