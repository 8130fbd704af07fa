# Copyright © 2026 MLX Contributors

"""Two answers and what they answer, made one pair."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from .content import RowFault, check_text, is_answer, without_nulls
from .messages import (
    Messages,
    as_messages,
    is_blank,
    parse_transcript,
    split_shared_prefix,
    with_system,
)
from .prompts import PROMPTS, Prompt, find_prompt, read_system
from .row import TOKENS, TOOLS, Reading, Row
from .turns import (
    HELD_ANSWER,
    OTHER_PROMPT,
    are_conversations,
    shared_turns,
    split_turns,
    without_answer,
)

TIE = "tie"
REPEATED = "both answers repeated the prompt, which is left out there"
UNREAD_TEXT = "no prompt, but text that is not read"
# Fewer words of a prompt may be an answer's first ones by chance.
_FEWEST_WORDS = 3


@dataclass
class PreferenceRow:
    """One preference pair, before it is tokenized."""

    prompt: Any
    chosen: Any
    rejected: Any
    shape: str
    wrapped: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    # The ids that a model wrote, its end among them, which text need not give back.
    chosen_tokens: list[int] | None = None
    rejected_tokens: list[int] | None = None
    # Where it comes from, and what was read of that.
    row: Row | None = None

    @property
    def format(self) -> str:
        """One of "chat", "text" and "wrapped text"."""
        if isinstance(self.prompt, str):
            return "text"
        return "wrapped text" if self.wrapped else "chat"


def make_pair(
    row: Row,
    chosen: Any,
    rejected: Any,
    reading: Reading,
    shape: str = "",
    prompt: Prompt | None = None,
    tokens: tuple = (None, None),
    **values: Any,
) -> PreferenceRow:
    """Make a pair of two answers and the prompt that the row has, or they share."""
    _check_differ(chosen, rejected)
    is_text = isinstance(chosen, str) and isinstance(rejected, str)
    if prompt is None:
        prompt = find_prompt(row, _opening(chosen, rejected))
    if prompt.value is None:
        pair = _shared_pair(row, chosen, rejected, reading.turns)
    elif is_text and isinstance(prompt.value, str):
        pair = _text_pair(row, prompt, chosen, rejected, reading.turns)
    else:
        pair = _chat_pair(row, prompt, *_both(as_messages, chosen, rejected))
    pair.shape = shape or pair.shape
    pair.values = values
    _check(pair)
    if reading.wrap_text and isinstance(pair.prompt, str):
        pair.prompt = [{"role": "user", "content": pair.prompt}]
        pair.chosen, pair.rejected = _both(as_messages, pair.chosen, pair.rejected)
        pair.wrapped = True
    else:
        pair.chosen_tokens, pair.rejected_tokens = tokens
    if not isinstance(pair.prompt, str):
        pair.template_kwargs = template_kwargs(row)
    return pair


def read_tokens(row: Row, name: str) -> list[int] | None:
    """The token ids of an answer, if a column has them."""
    return row.take(name, TOKENS) if are_tokens(row.get(name)) else None


def are_tokens(value: Any) -> bool:
    """Whether a value is a list of token ids; other columns may have such a name."""
    is_id = lambda x: type(x) is int and 0 <= x < 2**31
    return isinstance(value, list) and bool(value) and all(map(is_id, value))


def _both(read: Callable[[Any, str], Any], chosen: Any, rejected: Any) -> tuple:
    return read(chosen, "chosen"), read(rejected, "rejected")


def _check_differ(chosen: Any, rejected: Any) -> None:
    if chosen == rejected:
        raise RowFault("equal answers")


def _check(pair: PreferenceRow) -> None:
    for answer in (pair.chosen, pair.rejected):
        if is_blank(answer):
            raise RowFault("empty answer")
        if not isinstance(answer, str) and not is_answer(answer[-1]):
            raise RowFault("no assistant answer")
        if not isinstance(answer, str) and not is_answer(answer[0]):
            role = answer[0]["role"]
            raise RowFault(OTHER_PROMPT, f"an answer begins with a {role} turn")
    _check_differ(pair.chosen, pair.rejected)


def _opening(chosen: Any, rejected: Any) -> Messages:
    """The turns before an answer that two whole conversations begin with."""
    openings = []
    for side, name in ((chosen, "chosen"), (rejected, "rejected")):
        turns = side if isinstance(side, (list, tuple)) else []
        found = (as_messages([turn], name)[0] for turn in turns)
        openings.append(list(takewhile(lambda turn: not is_answer(turn), found)))
    return openings[0] if all(openings) else []


def _text_pair(
    row: Row, prompt: Prompt, chosen: str, rejected: str, turns: bool
) -> PreferenceRow:
    """Two texts after a text."""
    start = prompt.value
    answers = _both(check_text, chosen, rejected)
    chosen, rejected = answers
    shorter = _without(start, chosen), _without(start, rejected)
    parsed = parse_transcript(start)
    if parsed and parsed[-1] == {"role": "assistant", "content": ""}:
        answers = shorter
        if turns:
            size = len(parsed) - 1
            whole = [parse_transcript(start + side) or [] for side in answers]
            sides = whole[0][size:], whole[1][size:]
            messages, *turned = split_turns(parsed[:-1], *sides)
            return PreferenceRow(messages, turned[0], turned[1], "transcript")
    elif len(start.split()) >= _FEWEST_WORDS:
        if all(short != side for short, side in zip(shorter, answers)):
            row.remarks.append(REPEATED)
            answers = shorter
    return _question_pair(row, prompt, answers[0], answers[1], turns)


def _without(prompt: str, answer: str) -> str:
    """An answer without the prompt, if it begins with that."""
    if answer.startswith(prompt):
        return answer[len(prompt) :]
    whole, start = answer.lstrip(), prompt.strip()
    if not whole.startswith(start):
        return answer
    rest = whole[len(start) :]
    return rest if prompt == prompt.rstrip() else rest.lstrip()


def _question_pair(
    row: Row, prompt: Prompt, chosen: str, rejected: str, turns: bool
) -> PreferenceRow:
    """Text as it is; or a question: turns, or text with blank lines between."""
    system = read_system(row)
    if not prompt.value.strip():
        _remark_unread(row, "the prompt is empty")
    if not prompt.is_question and system is None:
        return PreferenceRow(prompt.value, chosen, rejected, prompt.shape)
    messages = with_system([{"role": "user", "content": prompt.value}], system)
    shape = prompt.shape if prompt.is_question else "Orca pairs"
    if turns:
        chosen, rejected = _both(as_messages, chosen, rejected)
        return PreferenceRow(messages, chosen, rejected, shape)
    text = "".join(f"{m['content']}\n\n" for m in messages if m["content"])
    return PreferenceRow(text, chosen, rejected, shape)


def _chat_pair(row: Row, prompt: Prompt, chosen: Any, rejected: Any) -> PreferenceRow:
    """Messages after messages or after a question."""
    shape, start = prompt.shape, prompt.value
    if isinstance(start, str):
        shape = shape if prompt.is_question else "conversations"
        shared = chosen[: shared_turns(chosen, rejected)]
        is_known = shared and not is_answer(shared[0])
        if is_known and are_conversations(start, shared):
            start = []
        else:
            start = [{"role": "user", "content": start}]
    else:
        shape = "messages" if shape == "text" else shape
        kept = without_answer(start, chosen, rejected, prompt.may_hold_answer)
        if len(kept) < len(start):
            row.remarks.append(HELD_ANSWER)
            start = kept
    start, chosen, rejected = split_turns(start, chosen, rejected)
    return PreferenceRow(with_system(start, read_system(row)), chosen, rejected, shape)


def _shared_pair(row: Row, chosen: Any, rejected: Any, turns: bool) -> PreferenceRow:
    """Answers whose common start is the prompt."""
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        messages = _both(as_messages, chosen, rejected)
        prompt, chosen, rejected = split_turns([], *messages)
        if not prompt:
            raise RowFault("no common prompt", _unread(row))
        prompt = with_system(prompt, read_system(row))
        return PreferenceRow(prompt, chosen, rejected, "shared messages")
    _both(check_text, chosen, rejected)
    sides = [s for s in map(parse_transcript, (chosen, rejected)) if s is not None]
    if len(sides) == 2:
        return _transcripts(chosen, rejected, sides, turns)
    prompt, chosen, rejected = split_shared_prefix(chosen, rejected)
    if not prompt.strip():
        for column in PROMPTS:
            if column.name in row.nulls:
                raise row.needs(column.name)
        if row.unread():
            raise RowFault(UNREAD_TEXT, _unread(row))
    _remark_unread(row, "the prompt is only what both answers begin with", len(prompt))
    return PreferenceRow(prompt, chosen, rejected, "shared text")


def _transcripts(chosen: str, rejected: str, sides: list, turns: bool) -> PreferenceRow:
    for messages in sides:
        if messages[-1]["role"] == "user":
            raise RowFault("no assistant answer")
        if is_blank(messages):
            raise RowFault("empty answer")
    if not turns:
        return PreferenceRow(*split_shared_prefix(chosen, rejected), "transcript")
    _check_differ(*sides)
    return PreferenceRow(*split_turns([], *sides), shape="transcript")


def _unread(row: Row) -> str:
    names = ", ".join(map(repr, row.unread()))
    return f"set prompt_feature if it is {names}" if names else ""


def _remark_unread(row: Row, what: str, shortest: int = 0) -> None:
    """Remark on columns that hold a longer text than the prompt."""
    for name in row.unread():
        text = row.get(name)
        if isinstance(text, str) and len(text) > shortest and " " in text.strip():
            row.remarks.append(
                f"[WARNING] {what}, while {name!r} is not read: set prompt_feature if "
                "that is the prompt"
            )


def template_kwargs(row: Row) -> dict[str, Any]:
    """The variables of the chat template that a row sets, its tools among them."""
    tools = _variable(row, "tools", list)
    kwargs = without_nulls(_variable(row, "chat_template_kwargs", Mapping) or {})
    if "tools" in kwargs:
        raise RowFault("tools twice", "chat_template_kwargs has them: leave them out")
    return {"tools": tools or None, **kwargs}


def _variable(row: Row, name: str, kind: type) -> Any:
    value = row.may(name, TOOLS)
    if not isinstance(value, str):
        # Tools that are JSON text have the nulls that they were given.
        value = without_nulls(value)
    else:
        try:
            # Tables of texts have an empty one where there are none.
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as e:
            raise RowFault(f"{name} are not JSON") from e
    if not isinstance(value, (kind, type(None))):
        raise RowFault("wrong type", f"{name} is {type(value).__name__}")
    return value
