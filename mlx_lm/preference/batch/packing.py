# Copyright © 2026 MLX Contributors

"""Several sequences in a row, each of which attends to itself alone.

Nothing is shared. A sequence begins somewhere in its row, which relative positions
don't notice; ``check_packing`` finds the models that do.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .shape import FREE_SHAPES, PLACED, BatchShape, Bucket

# In rows of so many tokens attention costs as much as the rest of a small model.
COSTLY_WIDTH = 2048


def _first_fit(lengths, width):
    """Row and column of each sequence, longest first, each where it first fits."""
    filled: list[int] = []
    places = [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = int(lengths[i])
        fits = (r for r, used in enumerate(filled) if used + length <= width)
        row = next(fits, len(filled))
        if row == len(filled):
            filled.append(0)
        places[i] = (row, filled[row])
        filled[row] += length
    return places, filled


def _cost(rows, width):
    return rows * width * (1 + width / COSTLY_WIDTH)


def _widths(longest, total, limit):
    most = max(min(total, limit), longest)
    return np.unique(np.geomspace(longest, most, 16).round().astype(int)).tolist()


def pack_rows(
    lengths: Any, width: int, step: int
) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Put sequences behind each other, the longest first, each where it first fits."""
    if step > 1:
        places, filled = _first_fit(lengths, width)
        return places, (step * max(-(-len(filled) // step), 1), width)
    best: tuple = (np.inf,)
    for tried in _widths(max(1, *lengths), sum(lengths), width):
        places, filled = _first_fit(lengths, tried)
        shape = (len(filled), max(1, *filled))
        best = min(best, (_cost(*shape), shape, places))
    return best[2], best[1]


def batch_shapes(
    inputs: np.ndarray, batch_size: int, width: int, step: int
) -> Iterator[tuple[int, int]]:
    """The rows' number and width of the batches that pairs make in their order."""
    for i in range(0, len(inputs), batch_size):
        yield pack_rows(inputs[i : i + batch_size].reshape(-1).tolist(), width, step)[1]


def best_width(
    inputs: np.ndarray, batch_size: int, step: int, pad: int, limit: int
) -> int:
    """How wide rows must be to cost least: wide ones hold more, but attend to more."""
    longest = max(int(inputs.max()), 1)
    total = 2 * batch_size * longest
    if step == 1:
        return max(min(total, limit), longest)
    # Pairs in an order that has nothing to do with their lengths.
    sample = np.random.default_rng(0).permutation(inputs)[: 8 * batch_size]
    costs = {}
    for width in _widths(longest, total, limit):
        width = max(min(pad * -(-width // pad), limit), longest)
        shapes = batch_shapes(sample, batch_size, width, step)
        costs[width] = sum(_cost(*shape) for shape in shapes)
    return min(costs, key=lambda width: (costs[width], width))


class Packed:
    """How rows are packed, as plans and batches ask for it."""

    def cut(self, max_shapes: int, batch_size: int, share: int) -> tuple[int, int]:
        """How many buckets there may be, and a number that all shapes have."""
        # So many numbers of rows for each width; not fewer where more ranks share.
        forms = min(batch_size, max_shapes, 4)
        free = max_shapes >= FREE_SHAPES
        step = 1 if free else max(-(-2 * share // forms), 2)
        return max_shapes // forms, step

    def widen(self, bucket: Bucket, inputs: np.ndarray, *limits: int) -> Bucket:
        """Give a bucket the shape of its batches."""
        share, step, pad, longest = limits
        width = best_width(inputs[bucket.indices], share, step, pad, longest)
        return bucket._replace(shape=bucket.shape._replace(width=width, packed=step))

    def place(self, lengths: Any, shape: BatchShape) -> tuple[list, tuple[int, int]]:
        """Row and column of each sequence, and how many rows and columns that is."""
        return pack_rows(lengths, shape.width, shape.packed)

    def tokens(self, inputs: np.ndarray, batch_size: int, shape: BatchShape) -> int:
        """Count the tokens that batches of pairs in their order compute."""
        shapes = batch_shapes(inputs, batch_size, shape.width, shape.packed)
        return sum(rows * width for rows, width in shapes)


PLACED["packed"] = Packed()
