# Copyright © 2026 MLX Contributors

"""Raw preference rows, tokenized, and notes on those that can't be used."""

from collections.abc import Iterator, Sequence
from typing import Any

from .messages import RowFault
from .notes import TOO_LONG
from .pairs import PreferenceRow
from .rankings import criteria_names, read_rows
from .table import ColumnsBuilder, TokenColumns
from .tokenizer import PairTokenizer, TokenPair

_CHUNK = 512


def tokenize_rows(
    data: Sequence[Any], encode: PairTokenizer, max_length: int, options: dict[str, Any]
) -> tuple[TokenColumns, dict[str, Any]]:
    """Tokenize raw rows of any known shape."""
    kind = options.get("kind", "pairs")
    builder = ColumnsBuilder(max_length, keep_whole=kind == "labels")
    locate = getattr(data, "location", int)
    skipped: dict[str, int] = {}
    first_skipped: dict[str, str | int] = {}
    details: dict[str, str] = {}
    dropped_tail: list[int] = []
    special_token = ""
    criteria: set[str] = set()
    counts = []
    for index, found, values in _tokenize(data, encode, options):
        pairs = [pair for pair in found if isinstance(pair, TokenPair)]
        fault = next((f for f in found if isinstance(f, RowFault)), None)
        if fault is None and any(len(pair.prompt) >= max_length for pair in pairs):
            fault = RowFault(TOO_LONG)
        if fault is not None:
            skipped[fault.reason] = skipped.get(fault.reason, 0) + 1
            first_skipped.setdefault(fault.reason, locate(index))
            details.setdefault(fault.reason, fault.detail)
        else:
            counts.append(len(pairs))
            for pair, numbers in zip(pairs, values, strict=True):
                dropped_tail = dropped_tail or pair.dropped
                special_token = special_token or pair.special
                builder.add(locate(index), pair, index, numbers)
        if options.get("criteria"):
            criteria |= criteria_names(data[index])
    columns = builder.finish()
    if kind == "rankings" and counts:
        columns = columns.regroup(max(counts), counts)
    if kind == "labels" and counts:
        columns = columns.by_turns()
    return columns, {
        "num_rows": len(data),
        "skipped": skipped,
        "first_skipped": first_skipped,
        "details": details,
        "dropped_tail": dropped_tail,
        "special_token": special_token,
        "criteria": sorted(criteria),
    }


def _tokenize(
    data: Sequence[Any], encode: PairTokenizer, options: dict[str, Any]
) -> Iterator[tuple[int, list[TokenPair | RowFault], list[dict[str, Any]]]]:
    """Each row's index, its pairs' ids or faults, and their values, by chunks."""
    for start in range(0, len(data), _CHUNK):
        rows: list[list[PreferenceRow] | RowFault] = []
        for index in range(start, min(start + _CHUNK, len(data))):
            try:
                rows.append(read_rows(data[index], **options))
            except RowFault as fault:
                rows.append(fault)
            except RecursionError:
                rows.append(RowFault("nested too deeply"))
        found = iter(encode([p for row in rows if isinstance(row, list) for p in row]))
        for index, row in enumerate(rows, start):
            if isinstance(row, RowFault):
                yield index, [row], []
            else:
                yield index, [next(found) for _ in row], [p.values for p in row]
