# Copyright © 2026 MLX Contributors

"""Rows and templates that don't fit at once, through the command.

What is right is written out as text, special tokens and all, or is what
``mlx_lm.server`` makes of messages.
"""

import datetime
import json
import sys
import threading
import unittest
from dataclasses import replace
from pathlib import Path
from unittest import mock

import test_reported_rows as reported
from row_cases import WORDS, Case, assistant, each, system, user
from test_dpo_command import command, metrics_of
from tiny import bos_tokenizer, save_tiny_model

from mlx_lm.preference.data import bounds, render
from mlx_lm.preference.data.content import RowFault
from mlx_lm.preference.watch.samples import PromptSamples
from mlx_lm.server import process_message_content

TURNS = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
CALLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + TURNS + "{% for c in "
    "m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}"
)
END = "{{ eos_token }}{% endfor %}"
GO = "{% if add_generation_prompt %}[assistant] {% endif %}"
LATE = (
    "{{ bos_token }}{% for m in messages if m.role != 'system' %}{% if m.role == 'user' "
    "%}[INST] {% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content }} {% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def pair(prompt, chosen="Yes.", rejected="No.", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def right(prompt, chosen="Yes.</s>\n", rejected="No.</s>\n"):
    return prompt, chosen, rejected


def ordered(word, write=lambda x: x, **call):
    function = {"name": "order", "arguments": write({"what": word})}
    return assistant(None) | {"tool_calls": [{"function": function, **call}]}


def tools(word):
    kind = {word: {"type": "string"}}
    return [{"type": "function", "function": {"name": word, "parameters": kind}}]


CALLED = each(
    lambda w: (
        f"<s>[user] {w}</s>[assistant] ",
        f'order{{"what": "{w}"}}</s>',
        'order{"what": "?"}</s>',
    )
)
GIGABYTES = Case(
    15,
    "a template that writes gigabytes at once",
    each(lambda w: pair([user(w)], chat_template_kwargs={"n": 10**10})),
    refused=r"4 rows: chat template takes too much memory \(first: .*train.jsonl:1, "
    "more than 1 GB for one row",
    template="{% set x = 'x' * n %}" + TURNS + END,
)
# No other system holds a process to an address space.
CASES = [
    Case(
        3,
        "content in parts",
        each(
            lambda w: pair(
                [user([{"type": "text", "text": f"A {w},"}, {"text": " please?"}])],
                [assistant([{"type": "text", "text": "Yes."}])],
                assistant(
                    [{"type": "text", "text": "No", "image": None}, {"text": "."}]
                ),
            )
        ),
        each(lambda w: right([user(f"A {w}, please?")])),
    ),
    Case(
        3,
        "an image among the parts",
        each(lambda w: pair([user([{"type": "image_url", "image_url": {"url": w}}])])),
        refused="content is not text .* a part of prompt is 'image_url'",
    ),
    Case(
        4,
        "arguments as JSON text",
        each(
            lambda w: pair(
                [user(w)], [ordered(w, json.dumps, id="1")], ordered("?", json.dumps)
            )
        ),
        CALLED,
        template=CALLS + END + GO,
    ),
    Case(
        4,
        "arguments as objects",
        each(lambda w: pair([user(w)], [ordered(w)], [ordered("?")])),
        CALLED,
        template=CALLS + END + GO,
    ),
    Case(
        4,
        "arguments that are no JSON",
        each(lambda w: pair([user(w)], ordered(w, str), "No.")),
        refused="tool arguments are not JSON .* chosen: ",
    ),
    Case(
        5,
        "several tools in a Parquet file",
        each(lambda w: pair([user(w)], [ordered(w)], [ordered("?")], tools=tools(w))),
        [
            (json.dumps(tools(w)[0]) + given, *answers)
            for w, (given, *answers) in zip(WORDS, CALLED)
        ],
        template=CALLS + END + GO,
        suffix=".parquet",
    ),
    Case(
        6,
        "a system text in the last user turn only",
        each(lambda w: pair([system("In French."), user(w)])),
        each(
            lambda w: right(
                f"<s>[INST] In French. {w} [/INST]", " Yes.</s>", " No.</s>"
            )
        ),
        says="In 4 pairs the chat template writes the prompt otherwise",
        template=LATE,
    ),
    Case(
        6,
        "an empty thought in the generation prompt only",
        each(lambda w: pair([user(w)])),
        each(
            lambda w: right(
                f"<s>[user] {w}</s>[assistant] <think></think>", "Yes.</s>", "No.</s>"
            )
        ),
        template=TURNS + END + GO.replace("] {", "] <think></think>{"),
    ),
    Case(
        6,
        "an opened thought that no answer closes",
        each(lambda w: pair([user(w)])),
        refused="the answer closes no thought .* begin it with <think> and </think>",
        template=TURNS + END + GO.replace("] {", "] <think>{"),
    ),
    Case(
        6,
        "an opened thought, and thoughts that are left out",
        each(lambda w: pair([user(w)], "<think>Hm.</think>Yes.", "</think>No.")),
        each(
            lambda w: right(
                f"<s>[user] {w}</s>[assistant] <think>",
                "Hm.</think>Yes.</s>",
                "</think>No.</s>",
            )
        ),
        template=TURNS.replace("m.content", "m.content.split('</think>')[-1]")
        + END
        + GO.replace("] {", "] <think>{"),
    ),
    Case(
        6,
        "a prompt that counts the turns to come",
        each(lambda w: pair([user(w)])),
        refused="hides where the answer begins .* give rendered text",
        template=TURNS + "({{ loop.length }})" + END + GO,
    ),
    Case(
        8,
        "names of roles",
        each(
            lambda w: {
                "prompt": [{"role": "User", "content": w}],
                "chosen": [{"role": "gpt", "content": "Yes."}],
                "rejected": [
                    {"role": "human", "content": w},
                    {"role": "bot", "content": "No."},
                ][1:],
            }
        ),
        each(lambda w: right([user(w)])),
    ),
    Case(
        8,
        "a role that nobody knows",
        each(lambda w: pair([{"role": "narrator", "content": w}, user(w)])),
        refused="unknown role .* narrator, which the template lacks",
    ),
    Case(
        8,
        "a role that the template knows",
        each(lambda w: pair([{"role": "developer", "content": w}])),
        each(
            lambda w: right(
                f"<s>[developer] {w}</s>[assistant] ", "Yes.</s>", "No.</s>"
            )
        ),
        template="{% if 'developer' == messages[0].role %}{% endif %}"
        + TURNS
        + END
        + GO,
    ),
    Case(
        11,
        "rendered text",
        each(lambda w: pair(f"<s>[user] {w}</s>\n[assistant] ", "Yes.</s>\n", "No.")),
        each(
            lambda w: right(f"<s>[user] {w}</s>\n[assistant] ", "Yes.</s>\n", "No.</s>")
        ),
        says="(?s)^(?!.*wrap_text).*4 pairs holds special tokens .'<s>'.*comes twice",
    ),
    Case(
        11,
        "EOS at the end of messages",
        each(lambda w: pair([user(w)], "Yes.</s>", [assistant("No.</s>\n")])),
        each(lambda w: right([user(w)])),
        says="(?s)^(?!.*special tokens)",
    ),
    Case(
        25,
        "EOS in what a user says",
        each(lambda w: pair([user(f"{w}</s>")])),
        each(lambda w: right([user(f"{w}</s>")])),
        says=r"\[WARNING\] The messages of 4 pairs hold special tokens \('</s>'\), .*"
        "escape_special_tokens: true",
    ),
    Case(
        15,
        "a template in a row",
        each(
            lambda w: pair([user(w)], chat_template_kwargs={"chat_template": "{{ 1 }}"})
        ),
        refused="not a variable of the template .* chat_template_kwargs has chat_template",
    ),
    Case(
        4,
        "calls that the template leaves out",
        each(lambda w: pair([user(w)], [ordered(w)], [ordered("?")])),
        refused=r"4 rows: equal answers \(first: train.jsonl:1, they differ in "
        "tool_calls, which the chat template drops",
        template=TURNS + END + GO,
    ),
    Case(
        15,
        "a template that ends no answer",
        each(lambda w: pair([user(w)])),
        each(lambda w: (f"<s>[user] {w}[assistant] ", "Yes.", "No.")),
        "In 4 pairs the chat template writes no token after an answer that ends",
        template=TURNS + "{% endfor %}" + GO,
    ),
    *([GIGABYTES] if Path("/proc/self/statm").exists() else []),
    Case(
        15,
        "a template that writes much, piece by piece",
        each(lambda w: pair([user(w)])),
        refused=r"4 rows: chat template writes too much \(first: .*train.jsonl:1, "
        "more than 4,000,000 characters for one row",
        template="{{ 'x' * 5000000 }}" + TURNS + END,
    ),
    Case(
        15,
        "a template that never ends",
        each(lambda w: pair([user(w)], chat_template_kwargs={"n": 99999})),
        refused=r"4 rows: chat template runs too long \(first: .*train.jsonl:1, stopped",
        template="{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}"
        + TURNS
        + END,
    ),
]


class TestReportedTemplates(reported.TestReportedRows):
    def test_cases(self):
        with mock.patch.object(bounds, "LONGEST", 0.5):
            for case in CASES:
                with self.subTest(row=case.number, name=case.name):
                    self.check(case)

    def test_a_template_that_never_ends_in_another_thread(self):
        tokenizer, found = bos_tokenizer(), []
        tokenizer.chat_template = CASES[-1].template
        renderer = render.ChatRenderer(tokenizer)

        def work():
            for n in (99999, 1):
                try:
                    renderer([user("a")], [[assistant("b")]], {"n": n})
                    found.append("rendered")
                except RowFault as fault:
                    found.append(fault.reason)
            # Python would look for an exception that was taken back before each call.
            sys.settrace(lambda *_: None)
            (lambda: found.append("called"))()

        with mock.patch.object(bounds, "LONGEST", 0.5):
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            thread.join(60)
        self.assertEqual(found, [bounds.TOO_SLOW, "rendered", "called"])

    def check(self, case):
        with mock.patch.object(self, "model", self.with_template(case.template)):
            super().check(replace(case, template=None))

    def with_template(self, template):
        if template is None:
            return self.model
        name = f"model {len(list(self.folder.glob('model *')))}"
        model = save_tiny_model(self.folder / name, max_position_embeddings=2048)
        (model / "chat_template.jinja").write_text(template)
        return model

    @staticmethod
    def ids(tokenizer, prompt, *answers):
        if isinstance(prompt, str):
            start = tokenizer.encode(prompt, add_special_tokens=False)
        else:
            process_message_content(prompt)
            start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        return start, *map(encode, answers)

    def test_special_tokens_as_text(self):
        case = Case(
            25, "escaped", each(lambda w: pair([user(f"{w}</s>")], "Yes.</s>", "No."))
        )
        flags = ("--escape-special-tokens",)
        code, out, err, dataset = self.read(replace(case, flags=flags), self.model)
        self.assertEqual((code, err), (0, ""))
        self.assertNotIn("special tokens", out)
        decode, eos = dataset.tokenizer.decode, dataset.tokenizer.eos_token_id
        for word, (prompt, chosen, rejected, _) in zip(WORDS, dataset):
            texts = [decode(ids.tolist()) for ids in (prompt, chosen, rejected)]
            start = f"<s>[user] {word}</s></s>\n[assistant] "
            self.assertEqual(texts, [start, "Yes.</s></s>\n", "No.</s>\n"])
            # One token of the template's in each.
            counts = [(ids == eos).sum() for ids in (prompt, chosen, rejected)]
            self.assertEqual(counts, [1, 1, 1])

    def test_a_run_keeps_the_date_of_its_start(self):
        today = "{% if m.role == 'user' %}{{ strftime_now('%d %B') }}{% endif %}"
        dated = TURNS + today + END + GO
        prompts = self.folder / "prompts.txt"
        prompts.write_text("Hm?")
        flags = self.flags("--save-every", 1, "--no-token-cache")
        flags += ["--sample-prompts", prompts, "--steps-per-eval", 1]
        # What the model is asked in place of what it answers.
        asked = lambda samples, model, prompts: [
            samples.tokenizer.decode(ids) for _, ids in prompts
        ]
        flags[flags.index("--model") + 1] = self.with_template(dated)
        printed = {}
        with (
            mock.patch.object(render, "date", wraps=datetime.date) as clock,
            mock.patch.object(PromptSamples, "_answers", asked),
        ):
            for day, argv in (
                (1, [*flags, "--iters", 2]),
                (2, ["--resume", self.adapters, "--iters", 3]),
                (3, ["--adapter-path", self.adapters, "--test", "--data", self.data]),
                (4, [*flags, "--dry-run"]),
            ):
                clock.today.return_value = datetime.date(2026, 5, day)
                code, out, err = command(*argv)
                self.assertEqual(code, 0, err)
                printed[day] = out
            self.assertEqual(metrics_of(self.adapters)[-1]["iteration"], 3)
            config = json.loads((self.adapters / "adapter_config.json").read_text())
            self.assertEqual(config["template_date"], "2026-05-01")
            samples = (self.adapters / "samples.jsonl").read_text().splitlines()
            right = {"<s>[user] Hm?01 May</s>[assistant] "}
            self.assertEqual({json.loads(x)["answer"] for x in samples}, right)
            self.assertEqual(json.loads(samples[-1])["iteration"], 3)
            self.assertIn("01 May", printed[2])
            self.assertIn("04 May", printed[4])
            code, _, err = command("--resume", self.adapters, "--template-date", "x")
        self.assertEqual(code, 2)


if __name__ == "__main__":
    unittest.main()
