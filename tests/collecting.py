# Copyright © 2026 MLX Contributors

"""Folders of answers and labels, and the command that collects, for tests."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from unittest import mock

from tiny import bos_tokenizer

from mlx_lm import dpo_collect
from mlx_lm.preference.collect.answers import Answers, Response, append_answers

TOKENIZER = bos_tokenizer()


def collect(*argv):
    """Run mlx_lm.dpo_collect in this process: exit code, stdout and stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    words = ["mlx_lm.dpo_collect", *map(str, argv)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with mock.patch.object(sys, "argv", words):
            try:
                dpo_collect.main()
            except SystemExit as e:
                code = e.code
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    return code, plain, err.getvalue()


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
