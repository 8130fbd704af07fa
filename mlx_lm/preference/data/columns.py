# Copyright © 2026 MLX Contributors

"""Columns of published data sets that hold prompts."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from .content import RowFault, check_text
from .messages import Messages, as_messages
from .prompts import PROMPTS, Prompt, PromptColumn, find_prompt, prompt_text
from .row import PROMPT, Row

# How HelpSteer2 parts the turns of a prompt.
_STEERLM = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def _messages(row: Row, value: Any) -> Messages:
    return as_messages(value, PROMPT)


def _full_text(row: Row, value: Any) -> Any:
    # WebGPT has objects.
    is_object = isinstance(value, Mapping) and "full_text" in value
    return prompt_text(row, value["full_text"] if is_object else value)


def _with_input(row: Row, value: Any) -> Any:
    more = row.may("input", PROMPT) if isinstance(value, str) else None
    return _with_history(
        row, f"{value}\n{check_text(more, 'input')}" if more else value
    )


def _with_history(row: Row, value: Any) -> Any:
    """The turns of a history before a question."""
    history = row.get("history")
    if not isinstance(value, str) or not isinstance(history, list) or not history:
        return prompt_text(row, value)
    row.take("history", PROMPT)
    turns = []
    for turn in history:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise RowFault("history is no list of questions with answers")
        for role, content in zip(("user", "assistant"), turn):
            turns.append({"role": role, "content": check_text(content, "history")})
    return [*turns, {"role": "user", "content": check_text(value, PROMPT)}]


def _request(row: Row, value: Any) -> Any:
    """OpenAI's request: messages, and tools beside them."""
    if isinstance(value, str) and "preferred_output" in row:
        # A table of cells has it as JSON.
        with suppress(ValueError, RecursionError):
            found = json.loads(value)
            value = found if isinstance(found, Mapping) else value
    if not isinstance(value, Mapping) or "messages" not in value:
        return prompt_text(row, value)
    if value.get("tools"):
        row.setdefault("tools", value["tools"])
    return as_messages(value["messages"], "input.messages")


PROMPTS += [
    PromptColumn("conversations", "ShareGPT ranking", _messages, is_conversation=True),
    PromptColumn("question", "Orca pairs", _full_text),
    PromptColumn("messages", "messages", _messages, is_conversation=True),
    PromptColumn("instruction", "Alpaca", _with_input),
    PromptColumn("query", "ms-swift", _with_history),
    PromptColumn("trajectory", "UltraInteract", _messages),
    PromptColumn("context", "context"),
    PromptColumn("input", "Orca pairs", _request),
]


def find_question(row: Row) -> Prompt:
    """Find a prompt that is a question to a chat model, whatever its column is called."""
    prompt = find_prompt(row)
    if prompt.value is None:
        raise row.needs(PROMPT)
    if isinstance(prompt.value, str):
        prompt.is_question = True
        first, *parts = _STEERLM.split(prompt.value)
        if parts:
            turns = zip(["User", *parts[::2]], [first, *parts[1::2]])
            prompt.value = [
                {"role": role.lower(), "content": text.strip()} for role, text in turns
            ]
    return prompt
