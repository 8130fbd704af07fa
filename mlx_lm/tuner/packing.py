# Copyright © 2026 MLX Contributors

"""Several sequences in a row, each of which attends to itself alone.

    pack_rows(lengths, ...)       which sequence goes where
    best_width(inputs, ...)       how wide the rows of similar pairs should be
    packed_states(model, batch)   hidden states, by block-diagonal attention

Nothing is shared. A sequence begins somewhere in its row, which relative positions
don't notice; ``check_packing`` finds the models that do.
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, make_prompt_cache

from .model_parts import trunk_states
from .shared_prompt import PromptKeysValues

# In rows of so many tokens attention costs as much as the rest of a small model.
COSTLY_WIDTH = 2048


class PackedKeysValues(PromptKeysValues):
    """
    Keys and values of rows that hold several sequences.

    Args:
        segments (mx.array): The sequence of each token, int32; 0 for padding.
            Shape: ``(R, L)``.
        window (int, optional): Tokens that a layer sees back, all if not given.
        offset (int): The position of each row's first token. Default: ``0``.

    Example:
        >>> cache = PackedKeysValues(mx.array([[1, 2, 2]]))
        >>> cache.make_mask(3).astype(mx.int32)[0, 0].tolist()
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    """

    def __init__(self, segments: mx.array, window: int | None = None, offset: int = 0):
        super().__init__(window)
        self.segments, self.offset = segments, offset

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """
        Which tokens of its own sequence each token attends to.

        Args:
            N (int): Tokens of a row.
            return_array (bool): Without effect: it is always an array.
            window_size (int, optional): Tokens that the layer sees back.

        Returns:
            mx.array: A boolean mask. Shape: ``(R, 1, N, N)``.

        Example:
            >>> PackedKeysValues(mx.array([[1, 1]])).make_mask(2, window_size=1).tolist()
            [[[[True, False], [False, True]]]]
        """
        same = self.segments[:, None, :, None] == self.segments[:, None, None, :]
        return same & create_causal_mask(N, window_size=window_size or self.window)


def _packed_cache(cache, segments, offset):
    if isinstance(cache, CacheList):
        return CacheList(*(_packed_cache(c, segments, offset) for c in cache.caches))
    # Chunked attention counts from the row's start, a recurrent state goes on.
    if not isinstance(cache, (KVCache, RotatingKVCache)):
        raise TypeError(f"Rows can't be packed for a {type(cache).__name__}.")
    window = cache.max_size if isinstance(cache, RotatingKVCache) else None
    return PackedKeysValues(segments, window, offset)


def packed_states(model: Any, batch: dict[str, Any]) -> mx.array:
    """
    Hidden states of packed rows.

    Args:
        model (nn.Module): A language model that ``check_packing`` accepts.
        batch (dict): With ``inputs`` and ``segments`` of shape ``(R, L)``; perhaps
            ``offset``, the position of each row's first token.

    Returns:
        mx.array: Shape: ``(R, L, D)``.

    Raises:
        TypeError: If the model has a kind of cache that can't be packed.

    Example:
        >>> packed_states.__name__  # see tests/test_packing.py
        'packed_states'
    """
    segments, offset = batch["segments"], batch.get("offset", 0)
    caches = [_packed_cache(c, segments, offset) for c in make_prompt_cache(model)]
    return trunk_states(model, batch["inputs"], caches)


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
    """
    Put sequences behind each other, the longest first, each where it first fits.

    Args:
        lengths (sequence): Tokens of each sequence, none above ``width``.
        width (int): Tokens of a row.
        step (int): Rows are a multiple of it. With ``1`` no shape costs anything:
            rows are then as wide as suits these sequences, up to ``width``.

    Returns:
        tuple: Row and first column of each sequence; and the rows' number and
        width.

    Example:
        >>> pack_rows([3, 5, 2], 6, 2)
        ([(1, 0), (0, 0), (1, 3)], (2, 6))
        >>> pack_rows([3, 5, 2], 6, 1)[1]
        (2, 5)
    """
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
    """
    The rows' number and width of the batches that pairs make in their order.

    Args:
        inputs (np.ndarray): Tokens of both inputs of each pair. Shape: ``(n, 2)``.
        batch_size (int): Pairs a batch.
        width (int): See ``pack_rows``.
        step (int): See ``pack_rows``.

    Yields:
        tuple: Rows and width of a batch.

    Example:
        >>> list(batch_shapes(np.array([[3, 3], [5, 6]]), 1, 6, 2))
        [(2, 6), (2, 6)]
    """
    for i in range(0, len(inputs), batch_size):
        yield pack_rows(inputs[i : i + batch_size].reshape(-1).tolist(), width, step)[1]


def best_width(
    inputs: np.ndarray, batch_size: int, step: int, pad: int, limit: int
) -> int:
    """
    How wide rows must be to cost least: wide ones hold more, but attend to more.

    Args:
        inputs (np.ndarray): Tokens of both inputs of each pair. Shape: ``(n, 2)``.
        batch_size (int): Pairs a batch.
        step (int): See ``pack_rows``.
        pad (int): The width is a multiple of it.
        limit (int): No row may be wider.

    Returns:
        int: Tokens; the widest useful row if each batch chooses for itself.

    Example:
        >>> best_width(np.array([[9, 9], [10, 2]] * 4), 2, 2, 1, 40)
        19
    """
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
