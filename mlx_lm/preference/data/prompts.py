# Copyright © 2026 MLX Contributors

"""Where rows keep what an answer answers."""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .messages import Messages, RowFault, as_messages, check_text
from .row import PROMPT, SYSTEM, Row
from .turns import are_conversations, same_turn

# How HelpSteer2 parts the turns of a prompt.
_STEERLM = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


@dataclass
class Prompt:
    """A row's prompt: messages, a text, or None where the answers hold it."""

    value: Any = None
    shape: str = ""
    # A question is a turn; other text is continued.
    is_question: bool = False
    # Some tables keep the whole conversation there, with an answer.
    may_hold_answer: bool = False


def _text(row: Row, value: Any) -> Any:
    return value if isinstance(value, (list, Mapping)) else check_text(value, PROMPT)


def _messages(row: Row, value: Any) -> Messages:
    return as_messages(value, PROMPT)


def _full_text(row: Row, value: Any) -> Any:
    # WebGPT has objects.
    is_object = isinstance(value, Mapping) and "full_text" in value
    return _text(row, value["full_text"] if is_object else value)


def _with_input(row: Row, value: Any) -> Any:
    more = row.may("input", PROMPT) if isinstance(value, str) else None
    return _with_history(
        row, f"{value}\n{check_text(more, 'input')}" if more else value
    )


def _with_history(row: Row, value: Any) -> Any:
    """The turns of a history before a question."""
    history = row.get("history")
    if not isinstance(value, str) or not isinstance(history, list) or not history:
        return _text(row, value)
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
        return _text(row, value)
    if value.get("tools"):
        row.setdefault("tools", value["tools"])
    return as_messages(value["messages"], "input.messages")


@dataclass(frozen=True)
class PromptColumn:
    """A column that prompts are found in, and the shape of its pairs."""

    name: str
    shape: str
    read: Callable[[Row, Any], Any] = _text
    is_question: bool = True
    is_conversation: bool = False


# The first that holds something is read.
PROMPTS = (
    PromptColumn("prompt", "text", is_question=False),
    PromptColumn("conversations", "ShareGPT ranking", _messages, is_conversation=True),
    PromptColumn("question", "Orca pairs", _full_text),
    PromptColumn("messages", "messages", _messages, is_conversation=True),
    PromptColumn("instruction", "Alpaca", _with_input),
    PromptColumn("query", "ms-swift", _with_history),
    PromptColumn("trajectory", "UltraInteract", _messages),
    PromptColumn("context", "context"),
    PromptColumn("input", "Orca pairs", _request),
)


def find_prompt(row: Row, opening: Messages | None = None) -> Prompt:
    """Find a row's prompt; ``opening``: how whole conversations as answers begin."""
    is_named = row.given[PROMPT] != PROMPT
    if is_named and PROMPT not in row:
        raise row.needs(PROMPT)
    columns = [c for c in PROMPTS[: 1 if is_named else None] if c.name in row]
    # Tables have all columns in every row: what is empty may be another shape's.
    for column in sorted(columns, key=lambda c: not row[c.name]):
        # Conversations need no other column, whatever it is for.
        must = column.name == PROMPT or not opening
        if must or _begins(row.peek(column.name), opening or [], column.name):
            return _read(row, column)
    return Prompt()


def _begins(value: Any, opening: Messages, name: str) -> bool:
    """Whether a conversation begins with what a column holds."""
    if isinstance(value, str):
        return are_conversations(value, opening)
    if not isinstance(value, list):
        return True
    last = as_messages(value, name)[-1]
    # What ends with an answer is another conversation.
    return any(same_turn(last, message) for message in opening)


def _read(row: Row, column: PromptColumn) -> Prompt:
    value = column.read(row, row.take(column.name, PROMPT))
    if not isinstance(value, str):
        value = as_messages(value, column.name)
    return Prompt(value, column.shape, column.is_question, column.is_conversation)


def read_system(row: Row) -> str | None:
    """The text of a row's system column."""
    for name in ("system", "system_prompt"):
        if name in row:
            return check_text(row.take(name, SYSTEM), name)
    return None


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
