# Copyright © 2026 MLX Contributors

"""The array shapes of batches, and what they cost in tokens."""

from typing import Any, NamedTuple

import numpy as np

from .packing import batch_shapes


class BatchShape(NamedTuple):
    """
    The array shapes of a batch.

    Args:
        prompt (int): Tokens of the shared prompts, 0 if nothing is shared.
        width (int): Tokens of the rows that the head reads.
        ragged (bool): Whether the shared prompts differ in length.
        scored (int): Tokens that the head scores, over all rows. 0: as many as
            the batch's pairs have, rounded up.
        shared (int): Tokens of the shared prompts that count, where all share as
            many: fewer than ``prompt`` if that is padded. 0: all of them.
        packed (int): Rows hold several sequences each, and their number is a
            multiple of it; 1: that and the width, up to ``width``, are each
            batch's own. 0: a row for each sequence.

    Example:
        >>> shape = BatchShape(prompt=64, width=32, shared=60)
        >>> shape.width, shape.start
        (32, 60)
    """

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


class Bucket(NamedTuple):
    """
    Pairs whose batches have one shape.

    Args:
        shape (BatchShape): The shape.
        indices (np.ndarray): The pairs.

    Example:
        >>> Bucket(BatchShape(0, 32, False), np.array([3, 5])).indices.tolist()
        [3, 5]
    """

    shape: BatchShape
    indices: np.ndarray


def input_lengths(lengths: np.ndarray) -> np.ndarray:
    """
    Split each pair into its shared prompt and its two rows.

    The last prompt token starts the rows, since it predicts the first answer
    token; the last token of an answer is only predicted.

    Args:
        lengths (np.ndarray): Length of the prompt, and of prompt + answer for
            chosen and rejected, in tokens. Shape: ``(n, 3)``.

    Returns:
        np.ndarray: Tokens of the shared prompt and of both whole inputs. Shape:
        ``(n, 3)``.

    Example:
        >>> input_lengths(np.array([[5, 7, 9], [0, 2, 3]])).tolist()
        [[4, 6, 8], [0, 1, 2]]
    """
    return np.maximum(np.asarray(lengths).reshape(-1, 3) - 1, 0)


def pair_lengths(dataset: Any) -> np.ndarray:
    """
    The lengths of all pairs of a data set.

    Args:
        dataset (PreferenceDataset): The pairs, or a list of such items.

    Returns:
        np.ndarray: Length of the prompt, and of prompt + answer for chosen and
        rejected, in tokens. Shape: ``(n, 3)``.

    Example:
        >>> pair_lengths([([1], [2], [3, 4], (1, 2, 3))]).tolist()
        [[1, 2, 3]]
    """
    if hasattr(dataset, "pair_lengths"):
        return dataset.pair_lengths()
    return np.array([dataset[i][3] for i in range(len(dataset))]).reshape(-1, 3)


def padded_tokens(
    buckets: list[Bucket], batch_size: int, lengths: np.ndarray | None = None
) -> int:
    """
    Count the tokens that one pass over all batches computes, padding included.

    Args:
        buckets (list): What ``length_buckets`` returned.
        batch_size (int): Pairs a batch.
        lengths (np.ndarray, optional): What ``pair_lengths`` returned, needed
            where rows hold several sequences: in order, unshuffled.

    Returns:
        int: Tokens; a short last batch counts as a whole one.

    Example:
        >>> padded_tokens([Bucket(BatchShape(8, 16, True), np.arange(3))], 2)
        160
    """
    total = 0
    for shape, indices in buckets:
        if shape.packed:
            inputs = input_lengths(lengths)[indices, 1:]
            shapes = batch_shapes(inputs, batch_size, shape.width, shape.packed)
            total += sum(rows * width for rows, width in shapes)
        else:
            pairs = -(-len(indices) // batch_size) * batch_size
            total += pairs * (shape.prompt + 2 * shape.width)
    return total


def batches_per_epoch(buckets: list[Bucket], batch_size: int) -> int:
    """
    Count the batches of one pass over the data.

    Args:
        buckets (list): What ``plan_batches`` returned.
        batch_size (int): Pairs a batch.

    Returns:
        int: Batches; the last of a bucket may be short.

    Example:
        >>> batches_per_epoch([Bucket(BatchShape(0, 16), np.arange(3))], 2)
        2
    """
    return sum(-(-len(b.indices) // batch_size) for b in buckets)


def needed_tokens(buckets: list[Bucket], lengths: np.ndarray) -> int:
    """
    Count the tokens that one pass needs: no padding, what is shared once.

    Args:
        buckets (list): What ``plan_batches`` returned.
        lengths (np.ndarray): What ``pair_lengths`` returned.

    Returns:
        int: Tokens.

    Example:
        >>> bucket = Bucket(BatchShape(2, 16), np.arange(1))
        >>> needed_tokens([bucket], np.array([[4, 6, 8]]))
        10
    """
    inputs, total = input_lengths(lengths), 0
    for shape, indices in buckets:
        shared, rows = inputs[indices, 0], inputs[indices, 1:].sum()
        once = shared if shape.ragged else np.full_like(shared, shape.start)
        total += int(rows - once.sum())
    return total
