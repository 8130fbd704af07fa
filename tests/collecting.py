# Copyright © 2026 MLX Contributors

"""Folders of answers and labels, and the command that collects, for tests."""

import json
from functools import partial
from pathlib import Path

from test_dpo_command import command
from tiny import bos_tokenizer

from mlx_lm import dpo_collect
from mlx_lm.preference.collect.answers import Answers, Response, append_answers

TOKENIZER = bos_tokenizer()


#: Run mlx_lm.dpo_collect in this process: exit code, stdout and stderr.
collect = partial(command, module=dpo_collect)


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
