# Copyright © 2026 MLX Contributors

"""The array shapes of batches, and what they cost in tokens."""

from typing import Any, NamedTuple

import numpy as np

from ..plug_ins import load

# Whoever allows so many shapes compiles none.
FREE_SHAPES = 1000


class BatchShape(NamedTuple):
    """The array shapes of a batch."""

    prompt: int
    width: int
    ragged: bool = False
    scored: int = 0
    shared: int = 0
    packed: int = 0

    @property
    def start(self) -> int:
        """Where a batch's rows go on, if its prompts are not ragged."""
        return self.shared or self.prompt

    @property
    def layout(self) -> str:
        """How its rows are laid out, by the name of ``sharing``."""
        if self.packed or not self.prompt:
            return "packed" if self.packed else "plain"
        return "ragged" if self.ragged else "equal"


class Bucket(NamedTuple):
    """Pairs whose batches have one shape."""

    shape: BatchShape
    indices: np.ndarray


# Who places sequences elsewhere than one in each row, as ``packing.Packed`` does, by
# the name of ``sharing``.
PLACED: dict[str, Any] = {}


def input_lengths(lengths: np.ndarray) -> np.ndarray:
    """Split each pair into its shared prompt and its two rows."""
    return np.maximum(np.asarray(lengths).reshape(-1, 3) - 1, 0)


def pair_lengths(dataset: Any) -> np.ndarray:
    """The lengths of all pairs of a data set."""
    if hasattr(dataset, "pair_lengths"):
        return dataset.pair_lengths()
    return np.array([dataset[i][3] for i in range(len(dataset))]).reshape(-1, 3)


def padded_tokens(
    buckets: list[Bucket], batch_size: int, lengths: np.ndarray | None = None
) -> int:
    """Count the tokens that one pass over all batches computes, padding included."""
    total = 0
    for shape, indices in buckets:
        if placing := PLACED.get(shape.layout):
            inputs = input_lengths(lengths)[indices, 1:]
            total += placing.tokens(inputs, batch_size, shape)
        else:
            pairs = -(-len(indices) // batch_size) * batch_size
            total += pairs * (shape.prompt + 2 * shape.width)
    return total


def batches_per_epoch(buckets: list[Bucket], batch_size: int) -> int:
    """Count the batches of one pass over the data."""
    return sum(-(-len(b.indices) // batch_size) for b in buckets)


def needed_tokens(buckets: list[Bucket], lengths: np.ndarray) -> int:
    """Count the tokens that one pass needs: no padding, what is shared once."""
    inputs, total = input_lengths(lengths), 0
    for shape, indices in buckets:
        shared, rows = inputs[indices, 0], inputs[indices, 1:].sum()
        once = shared if shape.ragged else np.full_like(shared, shape.start)
        total += int(rows - once.sum())
    return total


# Each fills the table.
PLUG_INS = ("packing",)
load(__package__, PLUG_INS)
