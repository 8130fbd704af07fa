# Copyright © 2026 MLX Contributors

"""Batches of preference pairs: which pairs, in what order, as which arrays."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .batch_shape import BatchShape, Bucket, pair_lengths
from .length_buckets import check_batch_size, length_buckets
from .packing import pack_rows


class PairBatch(NamedTuple):
    """
    A batch and where it came from.

    Args:
        indices (list): The index of each of the ``B`` pairs in the data set.
        arrays (dict): What ``collate_pairs`` made of them.

    Example:
        >>> PairBatch([3], {}).indices
        [3]
    """

    indices: list[int]
    arrays: dict[str, mx.array]


def _shape_for(pairs):
    # One of few shapes: 24 for up to 2,048 tokens.
    longest, step = max(max(n[1:]) for *_, n in pairs) - 1, 16
    while longest > 8 * step:
        step *= 2
    return BatchShape(0, max(step * -(-longest // step), 1))


def _row(pair, answer, shape):
    """A row's input tokens after the shared ones, its targets and its positions."""
    prompt, tokens, total = pair[0], pair[1 + answer], pair[3][1 + answer]
    sequence = np.concatenate([prompt, tokens]).astype(np.int32)
    shared = max(len(prompt) - 1, 0) if shape.ragged else shape.start
    # A first token that nothing precedes can't be scored.
    start = max(len(prompt), 1)
    return sequence[shared : total - 1], sequence[start:total], start - 1 - shared


def collate_pairs(
    pairs: list[tuple],
    batch_size: int | None = None,
    shape: BatchShape | None = None,
) -> dict[str, Any]:
    """
    Put pairs into arrays, all chosen rows first, padded on the right.

    Args:
        pairs (list): Items of a ``PreferenceDataset``: prompt, chosen and
            rejected token ids and their lengths.
        batch_size (int, optional): Number of pairs ``B`` to fill up to, with
            copies that weigh nothing. Default: the number of pairs.
        shape (BatchShape, optional): The shape of the batch's bucket. Default:
            whole rows, nothing shared.

    Returns:
        dict: ``inputs`` int32 of shape ``(2B, L)``, the rows' tokens without the
        last; ``lengths`` of prompt and of prompt + answer, int32 of shape
        ``(2B, 2)``; ``weights`` float32 of shape ``(B,)``, 0 for filling. For
        each of ``N`` scored tokens, int32 of shape ``(N,)``: ``targets``;
        ``positions`` of what predicts them in the flattened ``inputs``; ``rows``
        they belong to, ``2B`` for filling. Where prompts are shared ``prompts``
        int32 of shape ``(B, P)``, and where not all of it counts
        ``prompt_lengths`` of shape ``(B,)``; ``shared``, a number, where that is
        the same for all rows. Where rows are packed, ``inputs`` has as many as it
        takes, and ``segments`` of its shape names each token's sequence, 0 for
        padding.

    Example:
        >>> pair = ([5, 6], [7], [8, 9], (2, 3, 4))
        >>> batch = collate_pairs([pair], shape=BatchShape(1, 2))
        >>> batch["prompts"].tolist(), batch["inputs"].tolist()
        ([[5]], [[6, 0], [6, 8]])
        >>> [batch[k].tolist()[:3] for k in ("targets", "positions", "rows")]
        [[7, 8, 9], [0, 2, 3], [0, 1, 1]]
    """
    shape = shape or _shape_for(pairs)
    count = len(pairs)
    filling = (batch_size or count) - count
    pairs = pairs + [pairs[0]] * filling
    size = len(pairs)
    sequences = [_row(pairs[i % size], i // size, shape) for i in range(2 * size)]
    places, size_of_rows = [(i, 0) for i in range(2 * size)], (2 * size, shape.width)
    if shape.packed:
        # Filling takes no room.
        room = [len(x[0]) * (i % size < count) for i, x in enumerate(sequences)]
        places, size_of_rows = pack_rows(room, shape.width, shape.packed)
    inputs = np.zeros(size_of_rows, dtype=np.int32)
    segments = np.zeros_like(inputs)
    scored: list[tuple[np.ndarray, np.ndarray, int]] = []
    for i, (tokens, targets, first) in enumerate(sequences):
        (row, start), is_filling = places[i], i % size >= count
        if not (shape.packed and is_filling):
            inputs[row, start : start + len(tokens)] = tokens
            segments[row, start : start + len(tokens)] = i + 1
        if not is_filling:
            at = row * inputs.shape[1] + start + first + np.arange(len(targets))
            scored.append((targets, at, i))
    batch = {
        "inputs": inputs,
        "lengths": np.array([n[:2] for *_, n in pairs] + [n[::2] for *_, n in pairs]),
        "weights": np.array([1.0] * count + [0.0] * filling, dtype=np.float32),
        **_scored_arrays(scored, shape.scored, 2 * size),
    }
    if shape.packed:
        batch["segments"] = segments
    if shape.prompt:
        batch |= _prompt_arrays(pairs, shape)
    arrays: dict[str, Any] = {
        k: mx.array(v if v.dtype == np.float32 else v.astype(np.int32))
        for k, v in batch.items()
    }
    if shape.prompt and not shape.ragged and shape.start < shape.prompt:
        # Part of the shape, so no array.
        arrays["shared"] = shape.start
    return arrays


def _scored_arrays(scored, total, nowhere):
    count = sum(len(targets) for targets, _, _ in scored)
    total = total or max(16 * -(-count // 16), 1)
    targets, positions = np.zeros(total, np.int32), np.zeros(total, np.int32)
    rows = np.full(total, nowhere, np.int32)
    targets[:count] = np.concatenate([targets for targets, _, _ in scored])
    positions[:count] = np.concatenate([positions for _, positions, _ in scored])
    rows[:count] = np.repeat([r for *_, r in scored], [len(t) for t, *_ in scored])
    return {"targets": targets, "positions": positions, "rows": rows}


def _prompt_arrays(pairs, shape):
    prompts = np.zeros((len(pairs), shape.prompt), dtype=np.int32)
    lengths = np.full(len(pairs), shape.start)
    for i, (prompt, *_) in enumerate(pairs):
        if shape.ragged:
            lengths[i] = max(len(prompt) - 1, 0)
        prompts[i, : lengths[i]] = prompt[: lengths[i]]
    if not shape.ragged and shape.start == shape.prompt:
        return {"prompts": prompts}
    return {"prompts": prompts, "prompt_lengths": lengths}


def count_tokens(batch: dict[str, mx.array]) -> tuple[int, int]:
    """
    Count the tokens that a batch needs, and those that it computes.

    Args:
        batch (dict): What ``collate_pairs`` made.

    Returns:
        tuple: Tokens without padding and filling, a shared prompt once; and all.

    Example:
        >>> pair = ([5, 6], [7], [8, 9], (2, 3, 4))
        >>> count_tokens(collate_pairs([pair], 2, BatchShape(1, 2)))
        (4, 10)
    """
    inputs = np.array(batch["lengths"])[:, 1].reshape(2, -1) - 1
    shared, computed = np.zeros(inputs.shape[1]), batch["inputs"].size
    if "prompts" in batch:
        width = batch["prompts"].shape[1]
        shared = np.array(batch.get("prompt_lengths", shared + width))
        computed += batch["prompts"].size
    real = (inputs.sum(axis=0) - shared) * (np.array(batch["weights"]) > 0)
    return int(real.sum()), computed


def epoch_batches(
    buckets: list[Bucket],
    batch_size: int,
    seed: int | None = None,
    epoch: int = 0,
    group: int = 1,
) -> list[tuple[BatchShape, list[int]]]:
    """
    The batches of one pass over the data, without replacement.

    A function of its arguments alone, so that a resumed run sees the same
    batches. The last batch of a bucket may hold fewer pairs.

    Args:
        buckets (list): What ``plan_batches`` returned.
        batch_size (int): Pairs a batch.
        seed (int, optional): Shuffles the pairs of each bucket, and the batches.
            In order of length if it is not given.
        epoch (int): Which pass over the data. Default: ``0``.
        group (int): So many neighbours of a bucket stay together, and
            ``batch_size`` is a multiple of it. Default: ``1``.

    Returns:
        list: Shape and indices of each batch; every index occurs once.

    Example:
        >>> bucket = Bucket(BatchShape(0, 8), np.array([4, 5, 6]))
        >>> [indices for _, indices in epoch_batches([bucket], 2)]
        [[4, 5], [6]]
    """
    rng = None if seed is None else np.random.default_rng([seed, epoch])
    batches = []
    for shape, indices in buckets:
        order = indices
        if rng is not None:
            order = rng.permutation(indices.reshape(-1, group)).reshape(-1)
        for i in range(0, len(order), batch_size):
            batches.append((shape, order[i : i + batch_size].tolist()))
    if rng is not None:
        batches = [batches[i] for i in rng.permutation(len(batches))]
    return batches


def iterate_preference_batches(
    dataset: Any,
    batch_size: int,
    buckets: list[Bucket] | None = None,
    *,
    loop: bool = False,
    seed: int | None = None,
    comm_group: mx.distributed.Group | None = None,
    num_batches: int = -1,
    first_batch: int = 0,
) -> Iterator[PairBatch]:
    """
    Yield this rank's share of every batch.

    Args:
        dataset (PreferenceDataset): The pairs.
        batch_size (int): Pairs a batch over all ranks.
        buckets (list, optional): What ``plan_batches`` returned. Default: whole
            rows in buckets of similar length.
        loop (bool): Go on with the next epoch, for ever. Default: ``False``.
        seed (int, optional): Shuffle; in order of length if it is not given.
        comm_group (mx.distributed.Group, optional): The ranks that share the
            batches; they take disjoint pairs.
        num_batches (int): Only so many batches an epoch, spread over all
            lengths and always the same ones, or all with ``-1``. Default: ``-1``.
        first_batch (int): Start behind so many batches, counted over all epochs.
            Default: ``0``.

    Yields:
        PairBatch: The indices of the pairs, and the arrays.

    Raises:
        ValueError: If the data set holds fewer pairs than a looping batch needs,
            or ``batch_size`` can't be divided among ranks and rankings.

    Example:
        >>> pairs = [([5], [7], [8, 9], (1, 2, 3))]
        >>> len(list(iterate_preference_batches(pairs, 4)))
        1
    """
    rank, size = (comm_group.rank(), comm_group.size()) if comm_group else (0, 1)
    group = getattr(dataset, "group_size", 1)
    check_batch_size(batch_size, size, group)
    if loop and len(dataset) < batch_size:
        raise ValueError(
            f"The training set has {len(dataset)} usable pairs, fewer than "
            f"batch_size={batch_size}. Lower batch_size or add pairs."
        )
    if buckets is None:
        buckets = length_buckets(pair_lengths(dataset), batch_size, group=group)
    per_epoch = sum(-(-len(b.indices) // batch_size) for b in buckets)
    epoch, first = divmod(first_batch, per_epoch)
    while True:
        batches = epoch_batches(buckets, batch_size, seed, epoch, group)
        if 0 < num_batches < len(batches):
            sample = np.linspace(0, len(batches) - 1, num_batches).round()
            batches = [batches[int(i)] for i in sample]
        for shape, indices in batches[first:]:
            yield _share_of_batch(dataset, indices, batch_size, shape, rank, size)
        if not loop:
            return
        epoch, first = epoch + 1, 0


def value_arrays(
    dataset: Any, indices: list[int], weights: mx.array
) -> dict[str, mx.array]:
    """
    The numbers that a batch's pairs bring along.

    Args:
        dataset (PreferenceDataset): The pairs, with or without ``values``.
        indices (list): Those of the batch, without filling.
        weights (mx.array): 1 for a pair and 0 for filling. Shape: ``(B,)``.

    Returns:
        dict: Those in use of ``weights``, relative to the data set's mean and 0 for
        filling; ``margins`` in nats;
        ``labels``, 1 or 0; all of shape ``(B,)``; and ``places`` of shape ``(2B,)``,
        chosen answers first, -1 for filling and for copies.

    Example:
        >>> from types import SimpleNamespace
        >>> pairs = SimpleNamespace(values={"weights": np.array([0.5, 2.0])})
        >>> value_arrays(pairs, [1], mx.array([1.0, 0.0]))["weights"].tolist()
        [1.600000023841858, 0.0]
    """
    counts = np.array(weights) > 0
    found = {}
    for name, values in getattr(dataset, "values", {}).items():
        # Filling is put behind the pairs, as copies of the first.
        rows = values[indices + indices[:1] * (len(counts) - len(indices))]
        if name == "weights":
            # What a pair counts must not depend on the others of its batch.
            rows = rows * counts / values[values > 0].mean()
        if name == "places":
            rows = np.where(counts[:, None], rows, -1).T.reshape(-1)
        found[name] = mx.array(rows.astype(np.float32))
    return found


def _share_of_batch(dataset, indices, batch_size, shape, rank, size):
    group = getattr(dataset, "group_size", 1)
    mine = np.array(indices).reshape(-1, group)[rank::size].reshape(-1).tolist()
    # A short last batch may leave this rank nothing: fill with weight 0.
    taken = mine or indices[:group]
    batch = collate_pairs([dataset[i] for i in taken], batch_size // size, shape)
    if not mine:
        batch["weights"] = mx.zeros_like(batch["weights"])
    batch |= value_arrays(dataset, taken, batch["weights"])
    filling = [taken[0]] * (batch_size // size - len(taken))
    return PairBatch(taken + filling, batch)
