# Copyright © 2026 MLX Contributors

"""Batches of preference pairs: which pairs, in what order, how padded."""

from typing import Any, Iterator

import mlx.core as mx
import numpy as np


def padded_length(length: int, max_length: int | None = None) -> int:
    """
    Round a length up so that few shapes are compiled and little is padded.

    Multiples of 16 up to 128 tokens, then four steps an octave: at most a
    quarter is padding and 2,048 tokens need 24 shapes.

    Args:
        length (int): Tokens of the longest row.
        max_length (int, optional): Never pad beyond it.

    Returns:
        int: The padded length in tokens, at least ``length``.

    Example:
        >>> [padded_length(n) for n in (1, 33, 257, 700)]
        [16, 48, 320, 768]
    """
    step = 16
    while length > 8 * step:
        step *= 2
    padded = step * -(-max(length, 1) // step)
    return padded if max_length is None else max(length, min(padded, max_length))


def collate_pairs(
    pairs: list[tuple], batch_size: int | None = None, max_length: int | None = None
) -> dict[str, mx.array]:
    """
    Put pairs into one array, all chosen rows first, padded on the right.

    Args:
        pairs (list): Items of a ``PreferenceDataset``: prompt, chosen and
            rejected token ids and their lengths.
        batch_size (int, optional): Number of pairs ``B`` to fill up to, with
            copies that weigh nothing. Default: the number of pairs.
        max_length (int, optional): Never pad beyond it, in tokens.

    Returns:
        dict: ``tokens`` int32 of shape ``(2B, L)``; ``lengths`` of prompt and
        of prompt + completion, int32 of shape ``(2B, 2)``; ``weights`` float32
        of shape ``(B,)``, 0 for filling.

    Example:
        >>> pair = ([5, 6], [7], [8, 9], (2, 3, 4))
        >>> batch = collate_pairs([pair], max_length=5)
        >>> batch["tokens"].tolist(), batch["lengths"].tolist()
        ([[5, 6, 7, 0, 0], [5, 6, 8, 9, 0]], [[2, 3], [2, 4]])
    """
    weights = [1.0] * len(pairs)
    if batch_size is not None and len(pairs) < batch_size:
        weights += [0.0] * (batch_size - len(pairs))
        pairs = pairs + [pairs[0]] * (batch_size - len(pairs))
    rows = [(p, c, n[0], n[1]) for p, c, _, n in pairs]
    rows += [(p, r, n[0], n[2]) for p, _, r, n in pairs]
    width = padded_length(max(total for *_, total in rows), max_length)
    tokens = np.zeros((len(rows), width), dtype=np.int32)
    for row, (prompt, completion, start, total) in zip(tokens, rows):
        row[:start] = prompt
        row[start:total] = completion
    return {
        "tokens": mx.array(tokens),
        "lengths": mx.array([row[2:] for row in rows], dtype=mx.int32),
        "weights": mx.array(weights, dtype=mx.float32),
    }


def batch_indices(
    lengths: list[int], batch_size: int, seed: int | None = None, epoch: int = 0
) -> list[list[int]]:
    """
    Split a data set into batches of similar length, without replacement.

    A function of (seed, epoch) alone, so that a resumed run sees the same
    batches. The last batch to be cut may hold fewer pairs.

    Args:
        lengths (list): Length of every item in tokens.
        batch_size (int): Pairs a batch.
        seed (int, optional): Shuffles ties and the order of the batches. Sorted
            by length if it is not given.
        epoch (int): Which pass over the data. Default: ``0``.

    Returns:
        list: Lists of indices; every index occurs once.

    Example:
        >>> batch_indices([5, 1, 9, 2, 7], 2)
        [[1, 3], [0, 4], [2]]
    """
    order = np.arange(len(lengths))
    keys = np.array(lengths)
    rng = None if seed is None else np.random.default_rng([seed, epoch])
    if rng is not None:
        # Other neighbours each epoch, at no cost in padding.
        rng.shuffle(order)
        keys = np.array([padded_length(n) for n in lengths])
    order = order[np.argsort(keys[order], kind="stable")]
    batches = [
        order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)
    ]
    if rng is not None:
        rng.shuffle(batches)
    return batches


def iterate_preference_batches(
    dataset: Any,
    batch_size: int,
    max_length: int | None = None,
    *,
    loop: bool = False,
    seed: int | None = None,
    comm_group: mx.distributed.Group | None = None,
    num_batches: int = -1,
) -> Iterator[dict[str, mx.array]]:
    """
    Yield this rank's share of every batch.

    Args:
        dataset (PreferenceDataset): The pairs, with ``itemlen(i)`` in tokens.
        batch_size (int): Pairs a batch over all ranks.
        max_length (int, optional): Never pad beyond it, in tokens.
        loop (bool): Go on with the next epoch, for ever. Default: ``False``.
        seed (int, optional): Shuffle; sorted by length if it is not given.
        comm_group (mx.distributed.Group, optional): The ranks that share the
            batches; they take disjoint pairs.
        num_batches (int): Only so many batches an epoch, spread over all
            lengths and always the same ones, or all with ``-1``. Default: ``-1``.

    Yields:
        dict: A batch as ``collate_pairs`` makes it.

    Raises:
        ValueError: If the data set holds fewer pairs than a looping batch needs,
            or ``batch_size`` can't be divided among the ranks.

    Example:
        >>> class Pairs(list):
        ...     itemlen = lambda self, i: self[i][3][2]
        >>> pairs = Pairs([([5], [7], [8, 9], (1, 2, 3))])
        >>> len(list(iterate_preference_batches(pairs, 4)))
        1
    """
    rank, size = (comm_group.rank(), comm_group.size()) if comm_group else (0, 1)
    if batch_size < 1 or batch_size % size != 0:
        raise ValueError(
            f"batch_size must be a positive multiple of the {size} workers, "
            f"got {batch_size}."
        )
    if loop and len(dataset) < batch_size:
        raise ValueError(
            f"The training set has {len(dataset)} usable pairs, fewer than "
            f"batch_size={batch_size}. Lower batch_size or add pairs."
        )
    lengths = [dataset.itemlen(i) for i in range(len(dataset))]
    epoch = 0
    while True:
        batches = batch_indices(lengths, batch_size, seed, epoch)
        if 0 < num_batches < len(batches):
            sample = np.linspace(0, len(batches) - 1, num_batches).round()
            batches = [batches[int(i)] for i in sample]
        for indices in batches:
            mine = indices[rank::size]
            # A short last batch may leave this rank nothing: fill with weight 0.
            pairs = [dataset[i] for i in mine or indices[:1]]
            batch = collate_pairs(pairs, batch_size // size, max_length)
            if not mine:
                batch["weights"] = mx.zeros_like(batch["weights"])
            yield batch
        if not loop:
            return
        epoch += 1
