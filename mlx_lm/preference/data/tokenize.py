# Copyright © 2026 MLX Contributors

"""Raw preference rows, tokenized, and notes on those that can't be used."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from .messages import RowFault
from .pairs import TIE, PreferenceRow
from .rankings import KNOWN_SHAPES, NO_WEIGHT, criteria_names, read_rows
from .table import ColumnsBuilder, TokenColumns
from .tokenizer import PairTokenizer, TokenPair

TOO_LONG = "prompt fills max_length"
_CHUNK = 512


def tokenize_rows(
    data: Sequence[Any],
    encode: PairTokenizer,
    max_length: int,
    options: dict[str, Any],
) -> tuple[TokenColumns, dict[str, Any]]:
    """Tokenize raw rows of any known shape."""
    kind = options.get("kind", "pairs")
    builder = ColumnsBuilder(max_length, keep_whole=kind == "labels")
    locate = getattr(data, "location", int)
    skipped: dict[str, int] = {}
    first_skipped: dict[str, str | int] = {}
    details: dict[str, str] = {}
    dropped_tail: list[int] = []
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
                builder.add(locate(index), pair, index, numbers)
        if options.get("criteria"):
            criteria |= criteria_names(data[index])
    columns = builder.finish()
    if kind == "rankings" and counts:
        columns = columns.regroup(max(counts), counts)
    if kind == "labels" and counts:
        columns = columns.by_turns()
    notes = {
        "num_rows": len(data),
        "skipped": skipped,
        "first_skipped": first_skipped,
        "details": details,
        "dropped_tail": dropped_tail,
        "criteria": sorted(criteria),
    }
    return columns, notes


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


# Rows that are left out by rule, not because something is wrong with them.
_NOT_BAD = {TIE, TOO_LONG, NO_WEIGHT}


@dataclass(frozen=True)
class RowNotes:
    """What is known of the raw rows that a dataset was made of."""

    num_rows: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    first_skipped: Mapping[str, str | int] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)
    dropped_tail: Sequence[int] = ()
    criteria: Sequence[str] = ()

    def of_part(self, num_rows: int) -> "RowNotes":
        """Notes on some of the rows, none of which was skipped."""
        tail, criteria = self.dropped_tail, self.criteria
        return RowNotes(num_rows, dropped_tail=tail, criteria=criteria)

    @staticmethod
    def joined(parts: Sequence["RowNotes"]) -> "RowNotes":
        """Notes on the rows of several datasets."""
        first: dict[str, str | int] = {}
        details: dict[str, str] = {}
        skipped: Counter[str] = Counter()
        for part in parts:
            skipped.update(part.skipped)
            first = {**part.first_skipped, **first}
            details = {**part.details, **details}
        return RowNotes(
            sum(part.num_rows for part in parts),
            skipped,
            first,
            details,
            next((part.dropped_tail for part in parts if part.dropped_tail), ()),
            parts[0].criteria,
        )

    def lines(self) -> list[str]:
        """Say how many rows were skipped, and why."""
        return [
            f"{'' if reason in _NOT_BAD else '[WARNING] '}Skipped "
            f"{self._describe(reason, count)}."
            for reason, count in Counter(self.skipped).most_common()
        ]

    def check(
        self, source: str, used: int, max_length: int, max_bad_rows: float
    ) -> None:
        """Refuse data of which too little can be used."""
        if not self.num_rows:
            raise InputError(f"{source} has no rows.")
        if not used:
            worst = self._describe(*Counter(self.skipped).most_common(1)[0])
            hint = f"Known shapes: {'; '.join(KNOWN_SHAPES)}."
            if TOO_LONG in self.skipped:
                hint = f"Raise max_seq_length, which is {max_length:,}."
            raise InputError(
                f"{source}: no row of {self.num_rows:,} can be used. Skipped "
                f"{worst}. {hint}"
            )
        bad = Counter({k: n for k, n in self.skipped.items() if k not in _NOT_BAD})
        if bad.total() > max_bad_rows * self.num_rows:
            worst = self._describe(*bad.most_common(1)[0])
            raise InputError(
                f"{source}: {bad.total():,} of {self.num_rows:,} rows are bad, "
                f"more than max_bad_rows ({max_bad_rows:g}) allows. Most often {worst}. "
                "Mend the data, or raise max_bad_rows."
            )

    def check_criteria(self, source: str, wanted: Iterable[str]) -> None:
        """Refuse criteria that no row has."""
        for name in wanted:
            if str(name) not in self.criteria:
                known = ", ".join(map(repr, self.criteria[:20])) or "none"
                raise InputError(
                    f"{source}: no row has the criterion {name!r}. There are: {known}."
                )

    def _describe(self, reason: str, count: int) -> str:
        place, detail = self.first_skipped[reason], self.details[reason]
        place = place if isinstance(place, str) else f"row {place}"
        detail = f", {detail}" if detail else ""
        return f"{counted(count, 'row')}: {reason} (first: {place}{detail})"


def counted(number: int, noun: str) -> str:
    """Put a number before a noun."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
