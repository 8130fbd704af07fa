# Copyright © 2026 MLX Contributors

"""
Rows of a preference dataset, in any known shape, as prompt, chosen and rejected.

The shape of a row is told by its columns:

| columns | shape |
|---|---|
| prompt, chosen, rejected (text) | text |
| prompt, chosen, rejected (messages) | messages |
| prompt (text), chosen, rejected (whole conversations) | conversations |
| chosen, rejected (text) | shared text: the prompt is the common start |
| chosen, rejected (messages) | shared messages: the prompt is the common start |
| chosen, rejected, with "Human:" and "Assistant:" turns | transcript (HH-RLHF) |
| messages, rejected (messages or text) | messages and rejected |
| conversations, chosen, rejected (from and value) | ShareGPT ranking |
| history, human_ref_A, human_ref_B, labels | SHP |
| question, answer_0, answer_1, score_0, score_1 | WebGPT comparisons |
| system and prompt or question, chosen, rejected | Orca pairs |

:mod:`.rankings` has the shapes of rankings, criteria and labels.

Text and shared text stay raw text. Transcripts, SHP, WebGPT comparisons and Orca
pairs become turns where the tokenizer has a chat template.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .content import without_nulls
from .messages import (
    RowFault,
    as_messages,
    check_text,
    is_blank,
    parse_transcript,
    split_shared_prefix,
    with_system,
)

KNOWN_SHAPES = (
    "prompt + chosen + rejected",
    "chosen + rejected",
    "messages + rejected",
    "conversations + chosen + rejected",
    "question + chosen + rejected",
    "history + human_ref_A + human_ref_B + labels",
    "question + answer_0 + answer_1 + score_0 + score_1",
)
TIE = "tie"


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

    @property
    def format(self) -> str:
        """One of "chat", "text" and "wrapped text"."""
        if isinstance(self.prompt, str):
            return "text"
        return "wrapped text" if self.wrapped else "chat"


def read_row(
    row: Any,
    *,
    prompt_feature: str = "prompt",
    chosen_feature: str = "chosen",
    rejected_feature: str = "rejected",
    turns: bool = True,
    wrap_text: bool = False,
) -> PreferenceRow:
    """Read one raw row of any known shape."""
    if isinstance(row, RowFault):
        raise row
    if not isinstance(row, Mapping):
        raise RowFault("not a JSON object", type(row).__name__)
    row = _rename(
        row, prompt=prompt_feature, chosen=chosen_feature, rejected=rejected_feature
    )
    pair = _read_shape(row, turns)
    for answer in (pair.chosen, pair.rejected):
        if is_blank(answer):
            raise RowFault("empty answer")
        if not isinstance(answer, str) and answer[-1]["role"] in ("user", "system"):
            raise RowFault("no assistant answer")
    _check_differ(pair.chosen, pair.rejected)
    if wrap_text and isinstance(pair.prompt, str):
        pair.prompt = [{"role": "user", "content": pair.prompt}]
        pair.chosen, pair.rejected = _both(as_messages, pair.chosen, pair.rejected)
        pair.wrapped = True
    if not isinstance(pair.prompt, str):
        pair.template_kwargs = _template_kwargs(row)
    return pair


def _rename(row: Mapping, **features: str) -> dict:
    """Give the columns that the user named their standard names."""
    renamed = {k: v for k, v in row.items() if k not in features}
    for name, feature in features.items():
        if feature in row:
            renamed[name] = row[feature]
        elif feature != name:
            raise RowFault("missing column", feature)
        if feature not in features:
            renamed.pop(feature, None)
    return renamed


def _read_shape(row: dict, turns: bool) -> PreferenceRow:
    if "chosen" in row and "rejected" in row:
        if "prompt" in row:
            return _prompt_row(row, turns)
        if "conversations" in row:
            return _chat_row(row, "conversations", "ShareGPT ranking")
        if "question" in row:
            answers = row["chosen"], row["rejected"]
            return _question_row(row["question"], *answers, turns, row.get("system"))
        if "messages" in row and not isinstance(row["chosen"], list):
            return _chat_row(row, "messages", "messages")
        return _shared_row(row, turns)
    if "messages" in row and "rejected" in row:
        return _messages_row(row)
    if "history" in row and "labels" in row:
        return _shp_row(row, turns)
    if "question" in row and "score_0" in row:
        return _webgpt_row(row, turns)
    for name, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if other in row:
            raise RowFault("missing column", name)
    raise RowFault("unknown columns", ", ".join(sorted(map(str, row))))


def need_value(row: Mapping, name: str) -> Any:
    """Return what a row has in a column that it must have."""
    if name not in row:
        raise RowFault("missing column", name)
    if row[name] is None:
        raise RowFault("value is None", name)
    return row[name]


def _prompt_row(row: dict, turns: bool) -> PreferenceRow:
    prompt = need_value(row, "prompt")
    chosen, rejected = need_value(row, "chosen"), need_value(row, "rejected")
    if isinstance(prompt, (list, Mapping)):
        return _chat_row(row, "prompt", "messages")
    check_text(prompt, "prompt")
    if not isinstance(chosen, str) and not isinstance(rejected, str):
        shared, chosen, rejected = _split_messages(chosen, rejected)
        # Answers without a common start are answers to the prompt's text.
        shared = shared or [{"role": "user", "content": prompt}]
        shared = with_system(shared, row.get("system"))
        return PreferenceRow(shared, chosen, rejected, "conversations")
    if "system" in row:
        return _question_row(prompt, chosen, rejected, turns, row["system"])
    _both(check_text, chosen, rejected)
    messages = parse_transcript(prompt) if turns else None
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        chosen, rejected = _both(as_messages, chosen.strip(), rejected.strip())
        return PreferenceRow(messages[:-1], chosen, rejected, "transcript")
    return PreferenceRow(prompt, chosen, rejected, "text")


def _chat_row(row: dict, prompt_column: str, shape: str) -> PreferenceRow:
    prompt = as_messages(need_value(row, prompt_column), prompt_column)
    answers = need_value(row, "chosen"), need_value(row, "rejected")
    chosen, rejected = _both(as_messages, *answers)
    size = len(prompt)
    if chosen[:size] == prompt == rejected[:size]:
        # Whole conversations repeat the prompt.
        chosen, rejected = chosen[size:], rejected[size:]
    prompt = with_system(prompt, row.get("system"))
    return PreferenceRow(prompt, chosen, rejected, shape)


def _split_messages(chosen: Any, rejected: Any) -> tuple:
    chosen, rejected = _both(as_messages, chosen, rejected)
    _check_differ(chosen, rejected)
    return split_shared_prefix(chosen, rejected)


def _shared_row(row: dict, turns: bool) -> PreferenceRow:
    chosen, rejected = need_value(row, "chosen"), need_value(row, "rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        prompt, chosen, rejected = _split_messages(chosen, rejected)
        if not prompt:
            raise RowFault("no common prompt")
        prompt = with_system(prompt, row.get("system"))
        return PreferenceRow(prompt, chosen, rejected, "shared messages")
    _check_differ(*_both(check_text, chosen, rejected))
    sides = [s for s in map(parse_transcript, (chosen, rejected)) if s is not None]
    if len(sides) < 2:
        return PreferenceRow(*split_shared_prefix(chosen, rejected), "shared text")
    for messages in sides:
        if messages[-1]["role"] == "user":
            raise RowFault("no assistant answer")
        if is_blank(messages):
            raise RowFault("empty answer")
    if turns:
        chosen, rejected = sides
        _check_differ(chosen, rejected)
    return PreferenceRow(*split_shared_prefix(chosen, rejected), "transcript")


def _messages_row(row: dict) -> PreferenceRow:
    messages = as_messages(need_value(row, "messages"), "messages")
    rejected = as_messages(need_value(row, "rejected"), "rejected")
    if rejected[0] == messages[0]:
        # A whole conversation as well.
        prompt, chosen, rejected = _split_messages(messages, rejected)
    else:
        prompt, chosen = messages[:-1], messages[-1:]
    if not prompt:
        raise RowFault("no common prompt")
    prompt = with_system(prompt, row.get("system"))
    return PreferenceRow(prompt, chosen, rejected, "messages and rejected")


def _shp_row(row: dict, turns: bool) -> PreferenceRow:
    answers = need_value(row, "human_ref_A"), need_value(row, "human_ref_B")
    label = need_value(row, "labels")
    if label not in (0, 1):
        raise RowFault("label is not 0 or 1")
    answers = answers if label == 1 else answers[::-1]
    return _question_row(need_value(row, "history"), *answers, turns, shape="SHP")


def _webgpt_row(row: dict, turns: bool) -> PreferenceRow:
    question = need_value(row, "question")
    if isinstance(question, Mapping):
        question = need_value(question, "full_text")
    answers = need_value(row, "answer_0"), need_value(row, "answer_1")
    scores = need_value(row, "score_0"), need_value(row, "score_1")
    for score in scores:
        # Only NaN differs from itself.
        if not isinstance(score, (int, float)) or score != score:
            raise RowFault("score is not a number")
    if scores[0] == scores[1]:
        raise RowFault(TIE)
    answers = answers if scores[0] > scores[1] else answers[::-1]
    return _question_row(question, *answers, turns, shape="WebGPT comparisons")


def _question_row(
    question: Any,
    chosen: Any,
    rejected: Any,
    turns: bool,
    system: Any = None,
    shape: str = "Orca pairs",
) -> PreferenceRow:
    """A question with two answers: turns, or text with blank lines between."""
    question = check_text(question, "question")
    _both(check_text, chosen, rejected)
    prompt = with_system([{"role": "user", "content": question}], system)
    if turns:
        chosen, rejected = _both(as_messages, chosen, rejected)
        return PreferenceRow(prompt, chosen, rejected, shape)
    text = "".join(f"{m['content']}\n\n" for m in prompt if m["content"])
    return PreferenceRow(text, chosen, rejected, shape)


def _both(read: Callable[[Any, str], Any], chosen: Any, rejected: Any) -> tuple:
    return read(chosen, "chosen"), read(rejected, "rejected")


def _check_differ(chosen: Any, rejected: Any) -> None:
    if chosen == rejected:
        raise RowFault("equal answers")


def _template_kwargs(row: dict) -> dict[str, Any]:
    tools, kwargs = row.get("tools"), row.get("chat_template_kwargs")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
    except (ValueError, RecursionError) as e:
        raise RowFault("tools are not JSON") from e
    if not isinstance(tools, (list, type(None))):
        raise RowFault("wrong type", f"tools is {type(tools).__name__}")
    if not isinstance(kwargs, (Mapping, type(None))):
        raise RowFault("wrong type", f"chat_template_kwargs is {type(kwargs).__name__}")
    if "tools" in (kwargs := without_nulls(kwargs or {})):
        raise RowFault("tools twice", "chat_template_kwargs has them: leave them out")
    # Tools that are JSON text have the nulls that they were given.
    tools = tools if isinstance(row.get("tools"), str) else without_nulls(tools)
    return {"tools": tools or None, **kwargs}
