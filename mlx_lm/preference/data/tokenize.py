# Copyright © 2026 MLX Contributors

"""Raw preference rows, tokenized, and notes on those that can't be used."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..plug_ins import load
from .content import RowFault
from .notes import TOO_LONG, NotesBuilder
from .pairs import PreferenceRow
from .shapes import criteria_names, read_rows, separate
from .table import ColumnsBuilder, TokenColumns
from .tokenizer import PairTokenizer, TokenPair

# What keeps token ids for later runs, if anything does.
KEEPERS: list[Callable[..., Any]] = []
_CHUNK = 512
# Tokenizing takes some 150 bytes for each; models read fewer at a time.
MOST_CHARACTERS = 2_000_000


def tokenize_rows(
    data: Sequence[Any], encode: PairTokenizer, max_length: int, options: dict[str, Any]
) -> tuple[TokenColumns, dict[str, Any]]:
    """Tokenize raw rows of any known shape."""
    kind = options.get("kind", "pairs")
    builder = ColumnsBuilder(max_length, keep_whole=kind == "labels")
    notes = NotesBuilder()
    locate = getattr(data, "location", int)
    counts = []
    for index, raw, found, pairs in _tokenize(data, encode, options):
        place = locate(index)
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
    columns = builder.finish()
    if kind == "rankings" and counts:
        columns = columns.regroup(max(counts), counts)
    if kind == "labels" and counts:
        columns = columns.by_turns()
    return columns, notes.finish()


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


def _chunks(rows: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """Rows that are tokenized together: some, or as many as one long one."""
    chunk, size = [], 0
    for index, raw in rows:
        chunk.append((index, raw))
        size += _characters(raw)
        if len(chunk) == _CHUNK or size > MOST_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _tokenize(
    data: Sequence[Any], encode: PairTokenizer, options: dict[str, Any]
) -> Iterator[tuple[int, Any, list[TokenPair | RowFault], list[PreferenceRow]]]:
    """Each row with its index, its pairs' ids or faults, and its pairs, by chunks."""
    for chunk in _chunks(separate(data)):
        rows: list[list[PreferenceRow] | RowFault] = []
        for _, raw in chunk:
            try:
                if _characters(raw) > MOST_CHARACTERS:
                    raise RowFault(f"longer than {MOST_CHARACTERS:,} characters")
                rows.append(read_rows(raw, **options))
            except RowFault as fault:
                rows.append(fault)
            except RecursionError:
                rows.append(RowFault("nested too deeply"))
        found = iter(encode([p for row in rows if isinstance(row, list) for p in row]))
        for (index, raw), row in zip(chunk, rows, strict=True):
            if isinstance(row, RowFault):
                yield index, raw, [row], []
            else:
                yield index, raw, [next(found) for _ in row], row


# Each adds to the table.
PLUG_INS = ("cache",)
load(__package__, PLUG_INS)
