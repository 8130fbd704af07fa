# Copyright © 2026 MLX Contributors

"""Raw preference rows, tokenized, and notes on those that can't be used."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ..plug_ins import load
from .content import MOST_CHARACTERS, RowFault
from .notes import TOO_LONG, NotesBuilder, RowNotes
from .pairs import PreferenceRow
from .shapes import KNOWN_SHAPES, criteria_names, read_rows, separate
from .table import ColumnsBuilder, TokenColumns
from .tokenizer import PairTokenizer, TokenPair

# What keeps token ids for later runs, if anything does.
KEEPERS: list[Callable[..., Any]] = []
# What takes a part of the work, parts of the rows in their order, where it can.
HELPERS: list[Callable[..., list | None]] = []
_CHUNK = 512


@dataclass(frozen=True)
class _Part:
    """Some rows of a set: their pairs, what is known of them, pairs of each used row."""

    columns: TokenColumns
    notes: RowNotes
    counts: list[int]


def kept_or_tokenized(
    data: Sequence[Any],
    encode: PairTokenizer,
    max_length: int,
    arguments: dict[str, Any],
    folder: Any = None,
) -> tuple[TokenColumns, dict[str, Any]]:
    """Token ids of raw rows, out of a folder that keeps them, where there is one."""
    if not (folder and KEEPERS):
        return tokenize_rows(data, encode, max_length, arguments)
    # Rows of a new shape were skipped before.
    extra = {"max_length": max_length, "shapes": KNOWN_SHAPES}
    extra |= {"escapes": encode.escapes, "date": encode.template_date}
    keeper = KEEPERS[-1](folder, encode.tokenizer, {**arguments, **extra})
    if found := keeper.load(data):
        return found
    columns, notes = tokenize_rows(data, encode, max_length, arguments)
    keeper.save(data, columns, notes)
    return columns, notes


def tokenize_rows(
    data: Sequence[Any], encode: PairTokenizer, max_length: int, options: dict[str, Any]
) -> tuple[TokenColumns, dict[str, Any]]:
    """Tokenize raw rows of any known shape."""
    kind = options.get("kind", "pairs")
    locate = getattr(data, "location", int)
    work = partial(_tokenize_part, encode, max_length, options)
    placed = lambda: ((index, locate(index), raw) for index, raw in separate(data))
    helped = (one(work, placed(), len(data)) for one in HELPERS)
    parts: list[_Part] = next(filter(None, helped), []) or [work(placed())]
    columns = TokenColumns.concatenate([part.columns for part in parts])
    # Rows are numbered through already.
    columns = replace(columns, rows=np.concatenate([p.columns.rows for p in parts]))
    notes = RowNotes.joined([part.notes for part in parts])
    counts = [n for part in parts for n in part.counts]
    if kind == "rankings" and counts:
        columns = columns.regroup(max(counts), counts)
    if kind == "labels" and counts:
        columns = columns.by_turns()
    return columns, vars(notes)


def _tokenize_part(
    encode: PairTokenizer,
    max_length: int,
    options: dict[str, Any],
    rows: Iterable[tuple[int, str | int, Any]],
) -> _Part:
    is_labels = options.get("kind") == "labels"
    builder = ColumnsBuilder(max_length, keep_whole=is_labels)
    notes, counts = NotesBuilder(), []
    for (index, place, raw), found, pairs in _tokenize(rows, encode, options):
        fault = next((f for f in found if isinstance(f, RowFault)), None)
        tokens = [pair for pair in found if isinstance(pair, TokenPair)]
        if fault is None and any(len(pair.prompt) >= max_length for pair in tokens):
            fault = RowFault(TOO_LONG)
        notes.add(place, fault, tokens, pairs)
        if fault is None:
            counts.append(len(pairs))
            for pair, row in zip(tokens, pairs, strict=True):
                builder.add(place, pair, index, row.values)
        if options.get("criteria"):
            notes.criteria |= criteria_names(raw)
    return _Part(builder.finish(), notes.finish(), counts)


def _characters(value: Any) -> int:
    """Count the characters of a row, up to where it is too long."""
    count, waiting = 0, [value]
    while waiting and count <= MOST_CHARACTERS:
        value = waiting.pop()
        if isinstance(value, str):
            count += len(value)
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
    return count


def _chunks(rows: Iterable[tuple]) -> Iterator[list[tuple]]:
    """Rows that are tokenized together: some, or as many as one long one."""
    chunk, size = [], 0
    for row in rows:
        chunk.append(row)
        size += _characters(row[-1])
        if len(chunk) == _CHUNK or size > MOST_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _tokenize(
    data: Iterable[tuple], encode: PairTokenizer, options: dict[str, Any]
) -> Iterator[tuple[tuple, list[TokenPair | RowFault], list[PreferenceRow]]]:
    """Each row with its pairs' ids or faults, and its pairs, by chunks."""
    for chunk in _chunks(data):
        rows: list[list[PreferenceRow] | RowFault] = []
        for *_, raw in chunk:
            try:
                if _characters(raw) > MOST_CHARACTERS:
                    raise RowFault(f"longer than {MOST_CHARACTERS:,} characters")
                rows.append(read_rows(raw, **options))
            except RowFault as fault:
                rows.append(fault)
            except RecursionError:
                rows.append(RowFault("nested too deeply"))
        found = iter(encode([p for row in rows if isinstance(row, list) for p in row]))
        for given, row in zip(chunk, rows, strict=True):
            if isinstance(row, RowFault):
                yield given, [row], []
            else:
                yield given, [next(found) for _ in row], row


# Each adds to a table.
PLUG_INS = "cache", "processes"
load(__package__, PLUG_INS)
