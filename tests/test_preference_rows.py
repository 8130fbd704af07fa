# Copyright © 2026 MLX Contributors

import unittest

from row_cases import assistant, system, user

from mlx_lm.preference.data.content import RowFault, check_text
from mlx_lm.preference.data.messages import (
    as_messages,
    is_blank,
    parse_transcript,
    split_shared_prefix,
    with_system,
)
from mlx_lm.preference.data.pairs import PreferenceRow
from mlx_lm.preference.data.shapes import read_rows

HH = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Name a color.\n\nAssistant:"
HH_TURNS = [user("Hi"), assistant("Hello!"), user("Name a color.")]

# Shape name, row, and the prompt, chosen and rejected that it should give.
SHAPES = [
    (
        "text",
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        ("The sky is", " blue.", " green."),
    ),
    (
        "messages",
        {"prompt": [user("Hi")], "chosen": [assistant("a")], "rejected": "b"},
        ([user("Hi")], [assistant("a")], [assistant("b")]),
    ),
    (
        "messages",
        {
            "prompt": [user("Hi")],
            "chosen": [user("Hi"), assistant("a")],
            "rejected": [user("Hi"), assistant("b")],
            "system": "Be kind.",
        },
        ([system("Be kind."), user("Hi")], [assistant("a")], [assistant("b")]),
    ),
    (
        "messages",
        {"messages": [user("Hi")], "chosen": "a", "rejected": "b"},
        ([user("Hi")], [assistant("a")], [assistant("b")]),
    ),
    (
        "conversations",
        {
            "prompt": "Hi",
            "chosen": [user("Hi"), assistant("a")],
            "rejected": [user("Hi"), assistant("b")],
            "messages": [user("Hi"), assistant("a")],
            "score_chosen": 9.0,
        },
        ([user("Hi")], [assistant("a")], [assistant("b")]),
    ),
    (
        "shared messages",
        {
            "context": "Of a web page.",
            "instruction": "Label it.",
            "messages": [user("Ho"), assistant("c")],
            "chosen": [user("Hi"), assistant("a")],
            "rejected": [user("Hi"), assistant("b")],
        },
        ([user("Hi")], [assistant("a")], [assistant("b")]),
    ),
    (
        "conversations",
        {"prompt": "Hi", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        ([user("Hi")], [assistant("a")], [assistant("b")]),
    ),
    (
        "shared text",
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        ("The sky is", " blue.", " green."),
    ),
    (
        "shared messages",
        {
            "chosen": [user("Hi"), assistant("a"), user("c"), assistant("d")],
            "rejected": [user("Hi"), assistant("b")],
        },
        (
            [user("Hi")],
            [assistant("a"), user("c"), assistant("d")],
            [assistant("b")],
        ),
    ),
    (
        "transcript",
        {"chosen": HH + " Red.", "rejected": HH + " No.\n"},
        (HH_TURNS, [assistant("Red.")], [assistant("No.")]),
    ),
    (
        "transcript",
        {"prompt": HH, "chosen": " Red.", "rejected": " No."},
        (HH_TURNS, [assistant("Red.")], [assistant("No.")]),
    ),
    (
        "messages and rejected",
        {"messages": [user("Hi"), assistant("a")], "rejected": "b"},
        ([user("Hi")], [assistant("a")], [assistant("b")]),
    ),
    (
        "messages and rejected",
        {
            "messages": [user("Hi"), assistant("a")],
            "rejected": [user("Hi"), assistant("b")],
        },
        ([user("Hi")], [assistant("a")], [assistant("b")]),
    ),
    (
        "ShareGPT ranking",
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hi"},
            ],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        ([system("Be kind."), user("Hi")], [assistant("a")], [assistant("b")]),
    ),
    (
        "SHP",
        {"history": "Hi", "human_ref_A": "a", "human_ref_B": "b", "labels": 0},
        ([user("Hi")], [assistant("b")], [assistant("a")]),
    ),
    (
        "SHP",
        {"history": "Hi", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
        ([user("Hi")], [assistant("a")], [assistant("b")]),
    ),
    (
        "WebGPT comparisons",
        {
            "question": {"dataset": "x", "full_text": "Hi"},
            "answer_0": "a",
            "answer_1": "b",
            "score_0": -0.5,
            "score_1": 0.5,
        },
        ([user("Hi")], [assistant("b")], [assistant("a")]),
    ),
    (
        "WebGPT comparisons",
        {
            "question": "Hi",
            "answer_0": "a",
            "answer_1": "b",
            "score_0": 1,
            "score_1": 0,
        },
        ([user("Hi")], [assistant("a")], [assistant("b")]),
    ),
    (
        "Orca pairs",
        {"system": "Be kind.", "question": "Hi", "chosen": "a", "rejected": "b"},
        ([system("Be kind."), user("Hi")], [assistant("a")], [assistant("b")]),
    ),
    (
        "Orca pairs",
        {"system": "", "prompt": "Hi", "chosen": "a", "rejected": "b"},
        ([user("Hi")], [assistant("a")], [assistant("b")]),
    ),
]

PAIR = {"chosen": "a", "rejected": "b"}
WEBGPT = {"question": "q", "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": 0}
SHP = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}

# Reason, and a row that has this fault.
FAULTS = [
    ("not a JSON object", ["a", "b"]),
    ("missing column", {"prompt": "q", "chosen": "a"}),
    ("missing column", {"prompt": "q", "rejected": "a"}),
    ("missing column", {"history": "q", "human_ref_A": "a", "labels": 1}),
    ("unknown columns", {"text": "a"}),
    ("value is None", {**PAIR, "prompt": None}),
    ("value is None", {**PAIR, "prompt": "q", "chosen": None}),
    ("value is None", {**PAIR, "question": None}),
    ("value is None", {**SHP, "labels": None}),
    ("value is None", {**PAIR, "prompt": [{"role": "user", "content": None}]}),
    ("wrong type", {**PAIR, "prompt": 3}),
    ("wrong type", {"prompt": "q", "chosen": "a", "rejected": ["b"]}),
    ("wrong type", {**PAIR, "prompt": ["q"]}),
    ("wrong type", {**PAIR, "prompt": [{"role": 1, "content": "q"}]}),
    ("wrong type", {**PAIR, "prompt": [user("q")], "tools": 3}),
    ("wrong type", {**PAIR, "prompt": [user("q")], "chat_template_kwargs": [1]}),
    ("tools are not JSON", {**PAIR, "prompt": [user("q")], "tools": "{"}),
    (
        "chat_template_kwargs are not JSON",
        {**PAIR, "prompt": [user("q")], "chat_template_kwargs": "{"},
    ),
    ("invalid Unicode", {**PAIR, "prompt": "half a \ud83d smile"}),
    ("empty list of messages", {**PAIR, "prompt": []}),
    ("unknown role", {**PAIR, "prompt": [{"from": "narrator", "value": "q"}]}),
    (
        "content is not text",
        {**PAIR, "prompt": [user([{"type": "image", "image": "cat.png"}])]},
    ),
    ("content is not text", {**PAIR, "prompt": [user(["text"])]}),
    ("empty answer", {"prompt": "q", "chosen": "", "rejected": "b"}),
    ("empty answer", {"prompt": "q", "chosen": "a", "rejected": " \n"}),
    ("empty answer", {**PAIR, "prompt": [user("q")], "chosen": [assistant("")]}),
    ("empty answer", {"chosen": HH + " Red.", "rejected": HH}),
    ("equal answers", {"prompt": "q", "chosen": "a", "rejected": "a"}),
    ("equal answers", {"chosen": "q a", "rejected": "q a"}),
    ("equal answers", {"chosen": HH + " Red.", "rejected": HH + " Red. "}),
    ("equal answers", {"prompt": "q", **dict.fromkeys(PAIR, [user("q")])}),
    ("no assistant answer", {"prompt": [user("q")], **PAIR, "chosen": [user("a")]}),
    (
        "no assistant answer",
        {"chosen": HH + " Red.", "rejected": HH.rsplit("\n\n", 1)[0]},
    ),
    ("no common prompt", {"chosen": [user("a")], "rejected": [user("b")]}),
    ("no common prompt", {"messages": [assistant("a")], "rejected": "b"}),
    ("label is not 0 or 1", {**SHP, "labels": 2}),
    ("score is not a number", {**WEBGPT, "score_1": "0"}),
    ("score is not a number", {**WEBGPT, "score_1": float("nan")}),
    ("tie", {**WEBGPT, "score_1": 1.0}),
]


def read_row(raw, **options):
    """The one pair of a row."""
    (pair,) = read_rows(raw, **options)
    return pair


class TestShapes(unittest.TestCase):
    def test_read_row(self):
        for shape, row, (prompt, chosen, rejected) in SHAPES:
            with self.subTest(shape=shape, columns=sorted(row)):
                pair = read_row(row)
                self.assertIsInstance(pair, PreferenceRow)
                self.assertEqual(pair.shape, shape)
                self.assertEqual(pair.prompt, prompt)
                self.assertEqual(pair.chosen, chosen)
                self.assertEqual(pair.rejected, rejected)
                is_text = isinstance(prompt, str)
                self.assertEqual(pair.format, "text" if is_text else "chat")

    def test_rows_are_not_changed(self):
        row = {"prompt": [user("Hi")], "chosen": "a", "rejected": "b", "system": "s"}
        before = repr(row)
        read_row(row)
        self.assertEqual(repr(row), before)

    def test_without_turns(self):
        pair = read_row({"chosen": HH + " Red.", "rejected": HH + " No."}, turns=False)
        self.assertEqual(pair.prompt, HH)
        self.assertEqual((pair.chosen, pair.rejected), (" Red.", " No."))
        row = {"system": "Be kind.", "question": "Hi", "chosen": "a", "rejected": "b"}
        pair = read_row(row, turns=False)
        self.assertEqual(pair.prompt, "Be kind.\n\nHi\n\n")
        self.assertEqual(pair.format, "text")
        row = {"prompt": HH, "chosen": " Red.", "rejected": " No."}
        self.assertEqual(read_row(row, turns=False).prompt, HH)

    def test_wrap_text(self):
        row = {"prompt": "Hi", "chosen": "a", "rejected": "b", "tools": [{"name": "t"}]}
        pair = read_row(row, wrap_text=True)
        self.assertEqual(pair.prompt, [user("Hi")])
        self.assertEqual(pair.chosen, [assistant("a")])
        self.assertEqual(pair.format, "wrapped text")
        self.assertEqual(pair.template_kwargs, {"tools": [{"name": "t"}]})
        self.assertEqual(read_row(row).template_kwargs, {})
        row["prompt"] = [user("Hi")]
        self.assertEqual(read_row(row, wrap_text=True).format, "chat")

    def test_template_kwargs(self):
        row = {"prompt": [user("Hi")], "chosen": "a", "rejected": "b"}
        self.assertEqual(read_row(row).template_kwargs, {"tools": None})
        row |= {"tools": "", "chat_template_kwargs": " "}
        self.assertEqual(read_row(row).template_kwargs, {"tools": None})
        row["tools"] = '[{"name": "t"}]'
        row["chat_template_kwargs"] = {"enable_thinking": False, "date": None}
        self.assertEqual(
            read_row(row).template_kwargs,
            {"tools": [{"name": "t"}], "enable_thinking": False},
        )

    def test_features(self):
        row = {"q": "Hi", "good": "a", "bad": "b", "chosen": "x", "rejected": None}
        names = {"chosen_feature": "good", "rejected_feature": "bad"}
        pair = read_row(row, prompt_feature="q", **names)
        self.assertEqual((pair.prompt, pair.chosen, pair.rejected), ("Hi", "a", "b"))
        swapped = {"chosen_feature": "rejected", "rejected_feature": "chosen"}
        pair = read_row({"prompt": "Hi", "chosen": "a", "rejected": "b"}, **swapped)
        self.assertEqual((pair.chosen, pair.rejected), ("b", "a"))
        # A column that the user named is not read as another shape's.
        row = {
            "conversations": [user("Hi"), assistant("a")],
            "rejected": [user("Hi"), assistant("b")],
        }
        pair = read_row(row, chosen_feature="conversations")
        self.assertEqual((pair.shape, pair.prompt), ("shared messages", [user("Hi")]))
        # A prompt that the user named is never taken from the answers instead.
        with self.assertRaises(RowFault) as caught:
            read_row({"chosen": "q a", "rejected": "q b"}, prompt_feature="instruction")
        self.assertEqual(caught.exception.reason, "missing column")
        self.assertEqual(caught.exception.detail, "instruction")

    def test_faults(self):
        for reason, row in FAULTS:
            with self.subTest(reason=reason, row=row):
                with self.assertRaises(RowFault) as caught:
                    read_row(row)
                self.assertEqual(caught.exception.reason, reason)
                self.assertNotIn("\n", caught.exception.detail)

    def test_broken_json_is_an_answer(self):
        for text in ('{"value": 1', '[{"content": 2}]', "{'role': x}"):
            row = {"prompt": "Give JSON.", "chosen": '{"value": 1}', "rejected": text}
            self.assertEqual(read_row(row).rejected, text)

    def test_empty_prompt_is_fine(self):
        self.assertEqual(read_row({"prompt": "", **PAIR}).prompt, "")
        self.assertEqual(read_row(PAIR).prompt, "")

    def test_tool_calls_are_an_answer(self):
        call = {"role": "assistant", "tool_calls": [{"name": "t"}]}
        pair = read_row({"prompt": [user("Hi")], "chosen": [call], "rejected": "b"})
        # As mlx_lm.server hands it to the template.
        self.assertEqual(pair.chosen, [{**call, "content": ""}])


class TestMessages(unittest.TestCase):
    def test_split_shared_prefix(self):
        cases = [
            ("ab c", "ab d", ("ab", " c", " d")),
            ("abc", "abd", ("ab", "c", "d")),
            ("ab", "abc", ("a", "b", "bc")),
            ("a ", "b ", ("", "a ", "b ")),
            ("a b", "a b c", ("a ", "b", "b c")),
            ([1, 2, 3], [1, 4], ([1], [2, 3], [4])),
        ]
        for chosen, rejected, expected in cases:
            with self.subTest(chosen=chosen):
                self.assertEqual(split_shared_prefix(chosen, rejected), expected)

    def test_parse_transcript(self):
        turns = parse_transcript(HH + " The Human: one is red.")
        self.assertEqual(turns, HH_TURNS + [assistant("The Human: one is red.")])
        doubled = parse_transcript("Human: a\n\nHuman: b\n\nAssistant:\n\nAssistant: c")
        self.assertEqual(doubled, [user("a\n\nb"), assistant("c")])
        for text in ("", "Hi\n\nHuman: a", "\n\nAssistant: a", "Humans: a"):
            self.assertIsNone(parse_transcript(text))

    def test_helpers(self):
        self.assertEqual(check_text("grün", "prompt"), "grün")
        self.assertEqual(as_messages("a", "chosen"), [assistant("a")])
        self.assertEqual(with_system([system("x")], "y"), [system("x")])
        self.assertEqual(with_system([user("x")], " "), [user("x")])
        self.assertTrue(is_blank([]))
        self.assertFalse(is_blank("a"))


if __name__ == "__main__":
    unittest.main()
