# Copyright © 2026 MLX Contributors

"""Every known shape of rows in one table, and the way from a raw row to its pairs.

A row's columns tell its shape: it is the first in the table of which the row has all
columns that tell. Error messages and DPO_REFERENCE.md follow from the table.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..plug_ins import load
from .content import RowFault, is_number
from .pairs import PreferenceRow, make_pair, read_tokens
from .row import ANSWERS, VALUES, Reading, Row

NO_WEIGHT = "weight 0"
Reader = Callable[[Row, Reading], list[PreferenceRow]]


@dataclass(frozen=True)
class Shape:
    """A shape of rows: its name, the columns that tell it, and all columns in words."""

    name: str
    tells: str
    read: Reader
    columns: str = ""
    more: str = ""
    # One row may be several pairs, or half of one.
    several: bool = False


# What other shapes need. By the kind of data that is asked for, what a row's pairs
# become; readers that more than a row's columns tells; the criteria of a raw row; raw
# rows that are put together; and columns whose sign says which answer is better.
AS_KIND: dict[str, Callable[[list[PreferenceRow]], list[PreferenceRow]]] = {}
FINDERS: list[Callable[[Row, Reading], Reader | None]] = []
CRITERIA: list[Callable[[Any], set[str]]] = []
JOINED: list[Callable[[Any], Iterator[tuple[int, Any]]]] = []
SIGNED: set[str] = set()
# The options of rows that some of them alone read.
ROW_OPTIONS: set[str] = set()


def read_pair(
    row: Row,
    reading: Reading,
    names: tuple[str, str] = ("chosen", "rejected"),
    shape: str = "",
) -> list[PreferenceRow]:
    """Read two answers of two columns."""
    chosen, rejected = (row.take(name, ANSWERS) for name in names)
    tokens = tuple(read_tokens(row, f"{name}_tokens") for name in names)
    return [make_pair(row, chosen, rejected, reading, shape, tokens=tokens)]


CHOSEN_REJECTED = "chosen + rejected"

SHAPES = [
    Shape("text", CHOSEN_REJECTED, read_pair, "prompt, chosen, rejected (text)"),
    Shape(
        "messages", CHOSEN_REJECTED, read_pair, "prompt, chosen, rejected (messages)"
    ),
    Shape(
        "conversations",
        CHOSEN_REJECTED,
        read_pair,
        "prompt (text), chosen, rejected (whole conversations)",
    ),
    Shape(
        "shared text",
        CHOSEN_REJECTED,
        read_pair,
        "chosen, rejected (text)",
        "the prompt is the common start",
    ),
    Shape(
        "shared messages",
        CHOSEN_REJECTED,
        read_pair,
        "chosen, rejected (messages)",
        "the prompt is the common start",
    ),
    Shape(
        "transcript",
        CHOSEN_REJECTED,
        read_pair,
        'chosen, rejected, with "Human:" and "Assistant:" turns',
        "HH-RLHF",
    ),
]
# Each adds to the tables, before they are read.
PLUG_INS = "pair_shapes", "more_shapes"
load(__package__, PLUG_INS)
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
    if as_kind := AS_KIND.get(reading.kind):
        pairs = as_kind(pairs)
    _add_numbers(row, pairs, reading)
    return pairs


def _find(row: Row, reading: Reading) -> Reader:
    """Find the reader of a row."""
    if read := next(filter(None, (find(row, reading) for find in FINDERS)), None):
        return read
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
    return {name for names in CRITERIA for name in names(raw)}


def separate(rows: Any) -> Iterator[tuple[int, Any]]:
    """Raw rows with their places, those of one prompt together where they must be."""
    each = ((index, rows[index]) for index in range(len(rows)))
    return JOINED[-1](rows) if JOINED else each


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
    return abs(float(value)) if name in SIGNED else float(value)
