# Copyright © 2026 MLX Contributors

"""Where rows keep what an answer answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..plug_ins import load
from .content import check_text
from .messages import Messages, as_messages
from .row import PROMPT, SYSTEM, Row
from .turns import are_conversations, same_turn


@dataclass
class Prompt:
    """A row's prompt: messages, a text, or None where the answers hold it."""

    value: Any = None
    shape: str = ""
    # A question is a turn; other text is continued.
    is_question: bool = False
    # Some tables keep the whole conversation there, with an answer.
    may_hold_answer: bool = False


def prompt_text(row: Row, value: Any) -> Any:
    """A prompt as a column has it."""
    return value if isinstance(value, (list, Mapping)) else check_text(value, PROMPT)


@dataclass(frozen=True)
class PromptColumn:
    """A column that prompts are found in, and the shape of its pairs."""

    name: str
    shape: str
    read: Callable[[Row, Any], Any] = prompt_text
    is_question: bool = True
    is_conversation: bool = False


# The first that holds something is read.
PROMPTS = [PromptColumn("prompt", "text", is_question=False)]


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


# Each adds to the list.
PLUG_INS = ("columns",)
load(__package__, PLUG_INS)
