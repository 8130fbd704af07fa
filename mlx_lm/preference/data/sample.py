# Copyright © 2026 MLX Contributors

"""As many training rows as a run uses, chosen at random, where all are too many."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from ..terminal import rprint
from .large import PartsOfFiles
from .parsing import Rows, room
from .sources import FileRows
from .splits import SAMPLERS


class Sample(NamedTuple):
    """How many rows were asked for, and how many were read of how many."""

    most: int
    rows: int
    total: int


class PartOfRows(Sequence):
    """Some rows of a set, with their places in it."""

    is_part = True

    def __init__(self, found: Rows):
        self._found = found

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: Any) -> Any:
        return self._found[index][0]

    def location(self, index: int) -> str:
        """Name the place of a row."""
        return self._found[index][1]


def sample_rows(
    opened: Sequence[dict[str, Any]], most: int | None, enough: int | None, seed: int
) -> Sample | None:
    """Take at most so many training rows of all sets, or enough if all are too many."""
    having = [rows for rows in opened if "train" in rows]
    sets = [_parts_of(rows["train"]) for rows in having]
    count = enough if most is None else most
    if not sets or count is None:
        return None
    if most is None:
        if _fit(sets):
            return None
        rprint("The training rows do not fit into the memory: counting them.")
    # Whatever the memory, so that a run that goes on has the same.
    parts = [rows.some() for rows in sets]
    ends = np.cumsum([0, *map(len, parts)])
    numbers = draw(total := int(ends[-1]), count, seed)
    sample = Sample(count, len(numbers), total)
    if sample.rows * _size(sets) > total * room():
        raise InputError(
            f"{sample.rows:,} of {total:,} training rows take more than a quarter of "
            f"the free memory ({room() / 1e9:.2g} GB): set fewer iters, or max_rows."
        )
    rprint(
        f"Reading {sample.rows:,} of {total:,} training rows, chosen at random "
        f"(seed {seed})."
    )
    if sample.rows == total:
        return sample
    edges = np.searchsorted(numbers, ends)
    for rows, part, first, i, j in zip(having, parts, ends, edges, edges[1:]):
        rows["train"] = PartOfRows(_take(part, numbers[i:j] - first))
        if not rows["train"] and len(having) > 1:
            del rows["train"]
    return sample


def _parts_of(rows):
    return PartsOfFiles(rows) if isinstance(rows, FileRows) else rows


def _size(sets, exactly=True):
    return sum(rows.size(exactly) for rows in sets)


def _fit(sets):
    """Whether all rows do, by a quick bound or by what they have."""
    return any(_size(sets, exactly) <= room() for exactly in (False, True))


def _take(rows, numbers):
    if hasattr(rows, "take"):
        return rows.take(numbers)
    return [(rows[i], rows.location(i)) for i in numbers.tolist()]


def draw(total: int, count: int, seed: int) -> np.ndarray:
    """Choose so many of the numbers below a total, in rising order."""
    # RandomState keeps its numbers across NumPy versions; holding out takes the seed.
    rng = np.random.RandomState([seed, 1])
    if count >= total:
        return np.arange(total)
    if total <= 4 * count:
        return np.sort(rng.permutation(total)[:count])
    # Of far more, few are drawn twice.
    found = np.empty(0, np.int64)
    while len(found) < count:
        more = rng.randint(0, total, 2 * count, np.int64)
        firsts = np.unique(both := np.concatenate([found, more]), return_index=True)[1]
        found = both[np.sort(firsts)][:count]
    return np.sort(found)


SAMPLERS.append(sample_rows)
