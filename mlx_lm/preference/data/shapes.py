# Copyright © 2026 MLX Contributors

"""Every known shape of rows in one table, and the way from a raw row to its pairs.

A row's columns tell its shape: it is the first in the table of which the row has all
columns that tell. Error messages and DPO_REFERENCE.md follow from the table.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import published
from .content import RowFault
from .pairs import PreferenceRow, make_pair, read_tokens
from .rankings import is_number, read_label, read_ranking, singles
from .row import ANSWERS, VALUES, Reading, Row

NO_WEIGHT = "weight 0"
_STRENGTH = "from -3 to 3, below 0 for the first"


@dataclass(frozen=True)
class Shape:
    """A shape of rows: its name, the columns that tell it, and all columns in words."""

    name: str
    tells: str
    read: Callable[[Row, Reading], list[PreferenceRow]]
    columns: str = ""
    more: str = ""
    # One row may be several pairs, or half of one.
    several: bool = False


def _pair(
    row: Row,
    reading: Reading,
    names: tuple[str, str] = ("chosen", "rejected"),
    shape: str = "",
) -> list[PreferenceRow]:
    chosen, rejected = (row.take(name, ANSWERS) for name in names)
    tokens = tuple(read_tokens(row, f"{name}_tokens") for name in names)
    return [make_pair(row, chosen, rejected, reading, shape, tokens=tokens)]


_OPENAI = partial(
    _pair, names=("preferred_output", "non_preferred_output"), shape="OpenAI"
)
_SWIFT = partial(_pair, names=("response", "rejected_response"), shape="ms-swift")
_PAIRED = partial(
    _pair, names=("response_j", "response_k"), shape="Stack Exchange pairs"
)
_RESPONSES = partial(_pair, names=("chosen_response", "rejected_response"))
_C_R, _several = "chosen + rejected", partial(Shape, several=True)
_messages_and_rejected = published.read_messages_and_rejected

SHAPES = (
    Shape("text", _C_R, _pair, "prompt, chosen, rejected (text)"),
    Shape("messages", _C_R, _pair, "prompt, chosen, rejected (messages)"),
    Shape(
        "conversations",
        _C_R,
        _pair,
        "prompt (text), chosen, rejected (whole conversations)",
    ),
    Shape(
        "shared text",
        _C_R,
        _pair,
        "chosen, rejected (text)",
        "the prompt is the common start",
    ),
    Shape(
        "shared messages",
        _C_R,
        _pair,
        "chosen, rejected (messages)",
        "the prompt is the common start",
    ),
    Shape(
        "transcript",
        _C_R,
        _pair,
        'chosen, rejected, with "Human:" and "Assistant:" turns',
        "HH-RLHF",
    ),
    Shape(
        "ShareGPT ranking",
        _C_R,
        _pair,
        "conversations, chosen, rejected (from and value)",
        "LLaMA-Factory",
    ),
    Shape(
        "Alpaca",
        _C_R,
        _pair,
        "instruction, input, history, chosen, rejected",
        "LLaMA-Factory",
    ),
    Shape(
        "Orca pairs",
        _C_R,
        _pair,
        "system and prompt, question or input, chosen, rejected",
    ),
    Shape("UltraInteract", _C_R, _pair, "trajectory, chosen, rejected"),
    Shape("context", _C_R, _pair, "context, chosen, rejected"),
    Shape(
        "OpenAI",
        "preferred_output + non_preferred_output",
        _OPENAI,
        "input with messages and tools, preferred_output, non_preferred_output",
    ),
    Shape(
        "ms-swift",
        "response + rejected_response",
        _SWIFT,
        "query, response, rejected_response",
    ),
    Shape(
        "text",
        "chosen_response + rejected_response",
        _RESPONSES,
        "prompt, chosen_response, rejected_response (text)",
    ),
    Shape(
        "Stack Exchange pairs",
        "response_j + response_k",
        _PAIRED,
        "question, response_j, response_k",
    ),
    Shape(
        "messages and rejected",
        "messages + rejected",
        _messages_and_rejected,
        "messages, rejected or rejected_response (messages or text)",
    ),
    Shape(
        "messages and rejected", "messages + rejected_response", _messages_and_rejected
    ),
    Shape(
        "messages and rejected", "messages + rejected_messages", _messages_and_rejected
    ),
    Shape("messages and rejected", "conversations + rejected", _messages_and_rejected),
    Shape(
        "SHP",
        "history + labels",
        published.read_shp,
        "history, human_ref_A, human_ref_B, labels",
    ),
    Shape(
        "WebGPT comparisons",
        "question + score_0",
        published.read_webgpt,
        "question, answer_0, answer_1, score_0, score_1",
    ),
    Shape(
        "HelpSteer2 preference",
        "response_1 + preference_strength",
        published.read_strength,
        f"prompt, response_1, response_2, preference_strength {_STRENGTH}",
    ),
    Shape(
        "HelpSteer3",
        "response1 + overall_preference",
        published.read_strength,
        f"context, response1, response2, overall_preference {_STRENGTH}",
    ),
    Shape(
        "summarize from feedback",
        "info + summaries + choice",
        published.read_summaries,
        "info with post or article, summaries with text, choice",
    ),
    Shape(
        "arena",
        "conversation_a + winner",
        published.read_arena,
        "conversation_a, conversation_b, winner, turn",
        "Chatbot Arena, MT-bench",
    ),
    Shape(
        "arena lists",
        "response_a + winner_model_a",
        published.read_arena_lists,
        "prompt, response_a, response_b (lists of texts), winner_model_a, winner_model_b",
        "Chatbot Arena",
    ),
    _several(
        "ranking",
        "ranking",
        read_ranking,
        "prompt, ranking: list of answers, the best first",
    ),
    _several(
        "Nectar",
        "prompt + answers",
        published.read_answers,
        "prompt, answers with answer and rank",
    ),
    _several(
        "Stack Exchange",
        "question + answers",
        published.read_answers,
        "question, answers with text and pm_score",
    ),
    _several(
        "criteria",
        "criteria",
        published.read_scored,
        "prompt, criteria: name to chosen and rejected",
    ),
    _several(
        "criteria",
        "criteria + responses",
        published.read_scored,
        "prompt, responses, criteria: name to their scores, or the better one's place",
    ),
    _several(
        "UltraFeedback",
        "instruction + completions",
        published.read_scored,
        "instruction, completions with response and annotations",
    ),
    _several(
        "NeMo",
        "completions",
        published.read_completions,
        "context, completions with completion and rank",
    ),
    _several(
        "PKU-SafeRLHF",
        "response_0 + better_response_id",
        published.read_scored,
        "prompt, response_0, response_1, better_response_id, safer_response_id",
    ),
    _several(
        "HelpSteer2",
        "response + helpfulness",
        published.read_scored,
        f"prompt, response, {', '.join(published.HELPSTEER)}",
    ),
    _several("labelled", "completion + label", read_label, "prompt, completion, label"),
    _several("labelled", "response + label", read_label),
    _several(
        "labelled",
        "output + kto_tag",
        read_label,
        "instruction, input, output, kto_tag",
        "LLaMA-Factory",
    ),
    _several("labelled", "messages + label", read_label, "messages, label", "ms-swift"),
    _several(
        "labelled",
        "conversations + kto_tag",
        read_label,
        "conversations, kto_tag",
        "LLaMA-Factory",
    ),
    _several("labelled", "messages + kto_tag", read_label),
)
_READERS = {frozenset(shape.tells.split(" + ")): shape.read for shape in SHAPES}
# Without what is said of the columns.
KNOWN_SHAPES = tuple(
    dict.fromkeys(
        re.sub(r" \(.*?\)|, with .*|:[^,]*| with [^,]*", "", shape.columns)
        for shape in SHAPES
        if shape.columns
    )
)


def read_rows(raw: Any, **options: Any) -> list[PreferenceRow]:
    """Read one raw row of any known shape as all pairs that it holds."""
    if isinstance(raw, RowFault):
        raise raw
    if not isinstance(raw, Mapping):
        raise RowFault("not a JSON object", type(raw).__name__)
    reading = Reading(**options)
    row = Row(raw, reading)
    pairs = _find(row, reading)(row, reading)
    for pair in pairs:
        pair.row = row
    if reading.kind == "rankings":
        for pair in pairs:
            pair.values.setdefault("places", (0.0, 1.0))
    if reading.kind == "labels":
        pairs = [single for pair in pairs for single in singles(pair)]
    _add_numbers(row, pairs, reading)
    return pairs


def read_row(raw: Any, **options: Any) -> PreferenceRow:
    """Read a row that holds one pair."""
    (pair,) = read_rows(raw, **options)
    return pair


def _find(row: Row, reading: Reading) -> Callable[[Row, Reading], list]:
    """Find the reader of a row."""
    if reading.criteria and published.scored(row):
        return published.read_scored
    # What is null only tells what is missing.
    for names in (row.keys(), row.keys() | row.nulls):
        for told, read in _READERS.items():
            if told <= names:
                return read
    for name, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if other in row:
            raise row.needs(name)
    raise RowFault("unknown columns", ", ".join(sorted(map(str, row))))


def criteria_names(raw: Any) -> set[str]:
    """Name the criteria by which a raw row compares answers."""
    try:
        found = published.scored(Row(raw)) if isinstance(raw, Mapping) else None
    except RowFault:
        return set()
    return set(found.criteria) if found else set()


def _add_numbers(row: Row, pairs: list[PreferenceRow], reading: Reading) -> None:
    """Give the pairs the weight and the margin that the row has for them."""
    if (name := reading.weight_feature) is not None:
        weight = _read_number(row, name)
        if weight < 0:
            raise RowFault("weight is negative", name)
        # So small that it is 0 in float32 is 0.
        if weight < 1e-30:
            raise RowFault(NO_WEIGHT)
        for pair in pairs:
            pair.values["weights"] = weight * pair.values.get("weights", 1.0)
    if (name := reading.margin_feature) is not None:
        margin = _read_number(row, name)
        for pair in pairs:
            pair.values["margins"] = margin


def _read_number(row: Row, name: str) -> float:
    value = row.take(name, VALUES)
    if not is_number(value):
        raise RowFault("not a number", f"{name} is {value!r}")
    # The sign of a strength says which answer is better.
    return abs(float(value)) if name in published.SIGNED else float(value)
