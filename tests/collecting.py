# Copyright © 2026 MLX Contributors

"""Folders of answers and labels, and the command that collects, for tests."""

import json
import re
from pathlib import Path

from test_dpo_command import command
from tiny import bos_tokenizer

from mlx_lm import dpo_collect
from mlx_lm.preference.collect.answers import Answers, Response, append_answers

TOKENIZER = bos_tokenizer()


# One of a thing, said as if it were several.
NOUNS = "answers characters epochs iters judges labels ones pairs prompts rankings responses rounds"
NOUNS += " rows scores steps ties times tokens votes words"
SEVERAL = re.compile(rf"(?<![\d.,/])1 (\w+ )?({'|'.join(NOUNS.split())})\b")


def collect(*argv):
    """Run mlx_lm.dpo_collect in this process: exit code, stdout and stderr."""
    code, out, err = command(*argv, module=dpo_collect)
    check_counts(out)
    return code, out, err


def check_counts(printed):
    """Check that one thing is not counted as several."""
    found = SEVERAL.search(printed)
    assert found is None, f"{found[0]!r} in {printed}"


def answers(number, *texts, cut=(), **more):
    """The answers to one prompt; those whose places are in ``cut`` have no end."""
    prompt = [{"role": "user", "content": f"Question {number}?"}]
    responses = [
        Response(
            text,
            TOKENIZER.encode(text, add_special_tokens=False)
            + [TOKENIZER.eos_token_id] * (i not in cut),
            "length" if i in cut else "stop",
            -1.0,
        )
        for i, text in enumerate(texts)
    ]
    return Answers(**{"id": f"p{number}", "prompt": prompt} | more, responses=responses)


def save_answers(folder, *rows):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for row in rows:
        append_answers(folder, row)
    return Path(folder)


def read_lines(path):
    path = Path(path)
    return [*map(json.loads, path.read_text().splitlines())] if path.exists() else []
