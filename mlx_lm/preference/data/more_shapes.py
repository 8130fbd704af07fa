# Copyright © 2026 MLX Contributors

"""Shapes of published data sets: with choices, ratings, rankings and labels."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from . import published
from .content import RowFault
from .pairs import PreferenceRow
from .rankings import read_label, read_ranking, singles
from .row import Reading, Row
from .shapes import (
    AS_KIND,
    CRITERIA,
    FINDERS,
    JOINED,
    ROW_OPTIONS,
    SHAPES,
    SIGNED,
    Reader,
    Shape,
)

_STRENGTH = "from -3 to 3, below 0 for the first"
_several = partial(Shape, several=True)
_messages_and_rejected = published.read_messages_and_rejected

SHAPES += (
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


def _as_rankings(pairs: list[PreferenceRow]) -> list[PreferenceRow]:
    for pair in pairs:
        pair.values.setdefault("places", (0.0, 1.0))
    return pairs


def _as_labels(pairs: list[PreferenceRow]) -> list[PreferenceRow]:
    return [single for pair in pairs for single in singles(pair)]


def _by_criteria(row: Row, reading: Reading) -> Reader | None:
    asked = reading.criteria and published.scored(row)
    return published.read_scored if asked else None


def _criteria_names(raw: Any) -> set[str]:
    """Name the criteria by which a raw row compares answers."""
    try:
        found = published.scored(Row(raw)) if isinstance(raw, Mapping) else None
    except RowFault:
        return set()
    return set(found.criteria) if found else set()


AS_KIND |= {"rankings": _as_rankings, "labels": _as_labels}
FINDERS.append(_by_criteria)
CRITERIA.append(_criteria_names)
JOINED.append(published.joined)
ROW_OPTIONS |= {"criteria", "ranking_pairs"}
SIGNED.update(published.SIGNED)
