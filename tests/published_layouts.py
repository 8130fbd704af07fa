# Copyright © 2026 MLX Contributors

"""Layouts of published sets in which a choice is made, and what it is by default."""

import json

from row_cases import BAD, GOOD, WORDS, Case, assistant, each, user

LAYOUTS = [
    Case(
        0,
        "OpenAI",
        each(
            lambda w: {
                "input": {
                    "messages": [user(w)],
                    "tools": [],
                    "parallel_tool_calls": True,
                },
                "preferred_output": GOOD,
                "non_preferred_output": BAD,
            }
        ),
        each(lambda w: ([user(w)], GOOD, BAD)),
        says="prompt: input · answers: preferred_output, non_preferred_output",
    ),
    Case(
        0,
        "HelpSteer3, ties left out",
        each(
            lambda w: {
                "context": [user(w)],
                "response1": GOOD[0]["content"],
                "response2": BAD[0]["content"],
                "overall_preference": {"tea": -3, "hat": 0}.get(w, -1),
            }
        ),
        [([user(w)], GOOD, BAD) for w in ("tea", "pen", "cup")],
        says=r"Skipped 1 row: tie .* the sign of overall_preference, not its size",
    ),
    Case(
        0,
        "HelpSteer2's ratings of two rows",
        [
            {"prompt": w, "response": text, "helpfulness": n, "verbosity": 4 - n}
            for w in WORDS
            for text, n in ((BAD[0]["content"], 1), (GOOD[0]["content"], 3))
        ],
        each(lambda w: ([user(w)], GOOD, BAD)),
        says=r"Answers are compared by: criteria helpfulness\.",
    ),
    Case(
        0,
        "PKU-SafeRLHF",
        each(
            lambda w: {
                "prompt": w,
                "response_0": BAD[0]["content"],
                "response_1": GOOD[0]["content"],
                "better_response_id": 1,
                "safer_response_id": 0,
            }
        ),
        each(lambda w: ([user(w)], GOOD, BAD)),
        says=r"Answers are compared by: criteria better\.",
    ),
    Case(
        0,
        "Nectar",
        each(
            lambda w: {
                "prompt": f"\n\nHuman: {w}\n\nAssistant: ",
                "answers": [
                    {"answer": BAD[0]["content"], "model": "a", "rank": 2.0},
                    {"answer": GOOD[0]["content"], "model": "b", "rank": 1.0},
                ],
            }
        ),
        each(lambda w: ([user(w)], GOOD, BAD)),
        says=r"Answers are compared by: ranking_pairs all\.",
    ),
    Case(
        0,
        "MT-bench: ties, and the second turn beside a judgment of the first",
        each(
            lambda w: {
                "winner": "tie (bothbad)" if w == "hat" else "model_b",
                "conversation_a": [user(w), *BAD, user("So?"), assistant("Yes.")],
                "conversation_b": [user(w), *GOOD, user("So?"), assistant("No.")],
                "turn": 1,
            }
        ),
        [([user(w)], GOOD, BAD) for w in ("tea", "pen", "cup")],
        says="Skipped 1 row: tie",
    ),
    Case(
        0,
        "arena of 55,000: JSON lists",
        each(
            lambda w: {
                "prompt": json.dumps([w, "So?"]),
                "response_a": json.dumps(["Yes.", GOOD[0]["content"]]),
                "response_b": json.dumps(["Yes.", BAD[0]["content"]]),
                "winner_model_a": 1,
                "winner_model_b": 0,
                "winner_tie": 0,
            }
        ),
        each(lambda w: ([user(w), assistant("Yes."), user("So?")], GOOD, BAD)),
    ),
    Case(
        0,
        "summarize from feedback",
        each(
            lambda w: {
                "info": {"id": "1", "post": f"A {w}.", "title": None, "article": None},
                "summaries": [
                    {"text": f" {answer[0]['content']}", "policy": "p", "note": None}
                    for answer in (BAD, GOOD)
                ],
                "choice": 1,
            }
        ),
        each(lambda w: ([user(f"POST: A {w}.\n\nTL;DR:")], GOOD, BAD)),
    ),
    Case(
        0,
        "labels of LLaMA-Factory and ms-swift",
        [
            {"instruction": "tea", "input": "", "output": "Yes.", "kto_tag": True},
            {
                "conversations": [
                    {"from": "human", "value": "hat"},
                    {"from": "gpt", "value": "No."},
                ],
                "kto_tag": False,
            },
            {"messages": [user("pen"), assistant("Yes.")], "label": 1},
            {"prompt": "cup", "completion": [assistant("No.")], "label": 0},
        ],
        [
            ([user("tea")], [assistant("Yes.")], 1.0),
            ([user("hat")], [assistant("No.")], 0.0),
            ([user("pen")], [assistant("Yes.")], 1.0),
            ([user("cup")], [assistant("No.")], 0.0),
        ],
        says="preference: kto_tag, label",
        flags=("--loss-type", "kto"),
    ),
    Case(
        0,
        "ms-swift",
        each(
            lambda w: {
                "messages": [user(w), *GOOD],
                "rejected_response": BAD[0]["content"],
            }
        ),
        each(lambda w: ([user(w)], GOOD, BAD)),
    ),
]
