# Copyright © 2026 MLX Contributors

"""Prompts to be answered: lines of a text, rows with a prompt, or preference data."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data.columns import find_question
from ..data.content import RowFault, is_answer
from ..data.messages import with_system
from ..data.notes import NotesBuilder
from ..data.options import RowOptions
from ..data.parsing import SUFFIXES
from ..data.prompts import read_system
from ..data.row import PROMPT, SYSTEM, Row
from ..data.shapes import read_rows
from ..data.sources import open_sources
from ..errors import InputError
from ..terminal import counted, rprint
from ..watch.texts import read_lines_of
from .answers import Messages, prompt_id

# What a row of preference data has of answers: a prompt to be answered has none.
_ANSWERS = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")


@dataclass(frozen=True)
class PromptRow:
    """A prompt, its name, and the other columns of its row."""

    id: str
    prompt: str | Messages
    row: dict[str, Any] = field(default_factory=dict)
    place: str = ""

    @property
    def turns(self) -> Messages:
        """The prompt as a chat: a text is what a user says."""
        prompt = self.prompt
        return [user_turn(prompt)] if isinstance(prompt, str) else prompt


def user_turn(text: str) -> dict[str, Any]:
    """A text as what a user says."""
    return {"role": "user", "content": text}


def read_prompts(
    source: str | Path, max_bad_rows: float = RowOptions.max_bad_rows
) -> list[PromptRow]:
    """The prompts of a file, a folder or a data set, in their order, none of them twice."""
    found: dict[str, PromptRow] = {}
    faults: list[tuple[str, RowFault]] = []
    again: list[str] = []
    for place, raw in _rows(source):
        try:
            row = _prompt(raw, place)
        except RowFault as fault:
            faults.append((place, fault))
            continue
        if (before := found.setdefault(row.id, row)) is row:
            continue
        if isinstance(raw, Mapping) and raw.get("id") is not None:
            raise InputError(
                f"{place} has the id {row.id!r}, as {before.place} has: give each "
                "prompt an id of its own, or none."
            )
        again.append(place)
    if not found:
        reasons = Counter(str(fault) for _, fault in faults)
        why = f" ({reasons.most_common(1)[0][0]})" if reasons else ""
        raise InputError(
            f"{source} has no prompt{why}: give a text with one a line, .jsonl with "
            "prompt or messages, or preference data."
        )
    num_rows = len(found) + len(faults) + len(again)
    skip_rows(str(source), faults, num_rows, max_bad_rows)
    if again:
        rows = counted(len(again), "row")
        rprint(f"Skipped {rows}: a prompt that was there before (first: {again[0]}).")
    return list(found.values())


def skip_rows(
    source: str,
    faults: Sequence[tuple[str, RowFault]],
    num_rows: int,
    max_bad_rows: float,
) -> None:
    """Say which rows can't be used, as of data; refuse those with too many of them."""
    builder = NotesBuilder()
    for place, fault in faults:
        builder.add(place, fault, (), ())
    notes = replace(builder.finish(), num_rows=num_rows)
    notes.check(source, num_rows, 0, max_bad_rows)
    for line in notes.lines():
        rprint(line)


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


def _prompt(raw: Any, place: str) -> PromptRow:
    if isinstance(raw, str):
        return PromptRow(prompt_id(raw), raw, place=place)
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
    name = prompt_id(prompt) if name is None else str(name)
    # A table may hold times and bytes, which JSON writes as texts.
    prompt, kept = json.loads(json.dumps((prompt, kept), default=str))
    return PromptRow(name, prompt, kept, place)


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
        prompt = [user_turn(prompt)]
    if not isinstance(prompt, str):
        prompt = with_system(prompt, system)
    return prompt, {*row.roles.get(PROMPT, ()), *row.roles.get(SYSTEM, ())}
