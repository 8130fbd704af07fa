# Copyright © 2026 MLX Contributors

"""Prompts to be answered: lines of a text, rows with a prompt, or preference data."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.columns import find_question
from ..data.content import is_answer
from ..data.messages import RowFault, with_system
from ..data.parsing import SUFFIXES
from ..data.prompts import read_system
from ..data.row import PROMPT, SYSTEM, Row
from ..data.shapes import read_rows
from ..data.sources import open_sources
from ..errors import InputError
from ..files import read_lines_of
from ..terminal import rprint
from .answers import Messages, prompt_id

# What a row of preference data has of answers: a prompt to be answered has none.
_ANSWERS = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
# Lines that are named where rows are left out.
_SHOWN = 3


@dataclass(frozen=True)
class PromptRow:
    """A prompt, its name, and the other columns of its row."""

    id: str
    prompt: str | Messages
    row: dict[str, Any] = field(default_factory=dict)


def read_prompts(source: str | Path) -> list[PromptRow]:
    """The prompts of a file, a folder or a data set, in their order, none of them twice."""
    found: dict[str, tuple[PromptRow, str]] = {}
    left_out: dict[str, list[str]] = {}
    for place, raw in _rows(source):
        try:
            row = _prompt(raw)
        except RowFault as fault:
            left_out.setdefault(str(fault), []).append(place)
            continue
        before = found.get(row.id)
        if before is None:
            found[row.id] = row, place
        elif isinstance(raw, Mapping) and raw.get("id") is not None:
            raise InputError(
                f"{place} has the id {row.id!r}, as {before[1]} has: give each prompt "
                "an id of its own, or none."
            )
        else:
            left_out.setdefault("a prompt that was there before", []).append(place)
    for reason, places in left_out.items():
        more = f" and {len(places) - _SHOWN:,} more" if len(places) > _SHOWN else ""
        rprint(f"Left out, {reason}: {', '.join(places[:_SHOWN])}{more}.")
    if not found:
        reasons = Counter({reason: len(x) for reason, x in left_out.items()})
        why = f" ({reasons.most_common(1)[0][0]})" if reasons else ""
        raise InputError(
            f"{source} has no prompt{why}: give a text with one a line, .jsonl with "
            "prompt or messages, or preference data."
        )
    return [row for row, _ in found.values()]


def _rows(source: str | Path) -> Iterator[tuple[str, Any]]:
    """Each row with its place: a text of a line, or an object."""
    path = Path(source).expanduser()
    if path.is_file() and not path.name.lower().endswith(tuple(SUFFIXES)):
        yield from _lines(path)
        return
    for _, _, splits in open_sources(str(source)):
        names = ["train"] if "train" in splits else list(splits)
        for name in names:
            rows = splits[name]()
            for i in range(len(rows)):
                yield rows.location(i), rows[i]


def _lines(path: Path) -> Iterable[tuple[str, str]]:
    advice = "Give a text with one prompt a line, or .jsonl."
    lines = read_lines_of(path, "prompts", advice)
    if lines and all(_is_object(line) for _, line in lines[:10]):
        raise InputError(
            f"{path} has a JSON object in each line: name it {path.stem}.jsonl, else "
            "the model is asked the JSON itself."
        )
    return [(f"{path.name}:{i}", line) for i, line in lines]


def _is_object(line):
    with suppress(ValueError, RecursionError):
        return isinstance(json.loads(line), dict)
    return False


def _prompt(raw: Any) -> PromptRow:
    if isinstance(raw, str):
        return PromptRow(prompt_id(raw), raw)
    if isinstance(raw, RowFault):
        raise raw
    if not isinstance(raw, Mapping):
        raise RowFault("not a JSON object", type(raw).__name__)
    prompt, used = _of_pair(raw) or _of_row(raw)
    if not isinstance(prompt, str):
        # A whole conversation, whose last answer is given anew.
        while prompt and is_answer(prompt[-1]):
            prompt = prompt[:-1]
    if not prompt or isinstance(prompt, str) and not prompt.strip():
        raise RowFault("empty prompt")
    if not isinstance(prompt, str) and not prompt[-1]["content"].strip():
        raise RowFault("empty prompt")
    name = raw.get("id")
    if name is not None and (
        isinstance(name, bool) or not isinstance(name, (str, int))
    ):
        raise RowFault("wrong type", f"id is {type(name).__name__}")
    kept = {k: x for k, x in raw.items() if k not in used and k != "id"}
    return PromptRow(prompt_id(prompt) if name is None else str(name), prompt, kept)


def _of_pair(raw: Mapping) -> tuple[Any, set[str]] | None:
    """The prompt of a preference pair, None if the row is no such pair."""
    with suppress(RowFault):
        pair = read_rows(raw)[0]
        roles = pair.row.roles if pair.row else {}
        return pair.prompt, {*roles.get(PROMPT, ()), *roles.get(SYSTEM, ()), *_ANSWERS}
    return None


def _of_row(raw: Mapping) -> tuple[Any, set[str]]:
    row = Row(raw)
    found = find_question(row)
    system = read_system(row)
    prompt = found.value
    if isinstance(prompt, str) and system:
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, str):
        prompt = with_system(prompt, system)
    return prompt, {*row.roles.get(PROMPT, ()), *row.roles.get(SYSTEM, ())}
