# Copyright © 2026 MLX Contributors

"""Batches of preference pairs: which pairs, in what order, as which arrays."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import InputError
from .buckets import check_batch_size, length_buckets
from .shape import PLACED, BatchShape, Bucket, batches_per_epoch, pair_lengths


class PairBatch(NamedTuple):
    """A batch and where it came from."""

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
    targets = sequence[start:total]
    # What others say within an answer is there as its complement.
    scored = np.flatnonzero(targets >= 0)
    sequence = np.where(sequence < 0, ~sequence, sequence)
    places = start - 1 - shared + scored
    return sequence[shared : total - 1], targets[scored], places


def collate_pairs(
    pairs: list[tuple], batch_size: int | None = None, shape: BatchShape | None = None
) -> dict[str, Any]:
    """Put pairs into arrays, all chosen rows first, padded on the right."""
    shape = shape or _shape_for(pairs)
    count = len(pairs)
    filling = (batch_size or count) - count
    pairs = pairs + [pairs[0]] * filling
    size = len(pairs)
    sequences = [_row(pairs[i % size], i // size, shape) for i in range(2 * size)]
    places, size_of_rows = [(i, 0) for i in range(2 * size)], (2 * size, shape.width)
    if placing := PLACED.get(shape.layout):
        # Filling takes no room.
        room = [len(x[0]) * (i % size < count) for i, x in enumerate(sequences)]
        places, size_of_rows = placing.place(room, shape)
    inputs = np.zeros(size_of_rows, dtype=np.int32)
    segments = np.zeros_like(inputs)
    scored: list[tuple[np.ndarray, ...]] = []
    for i, (tokens, targets, at) in enumerate(sequences):
        (row, start), is_filling = places[i], i % size >= count
        if not (placing and is_filling):
            inputs[row, start : start + len(tokens)] = tokens
            segments[row, start : start + len(tokens)] = i + 1
        if not is_filling:
            at = row * inputs.shape[1] + start + at
            scored.append((targets, at, np.full(len(targets), i)))
    batch = {
        "inputs": inputs,
        "lengths": np.array([n[:2] for *_, n in pairs] + [n[::2] for *_, n in pairs]),
        "weights": np.array([1.0] * count + [0.0] * filling, dtype=np.float32),
        **_scored_arrays(scored, shape.scored, 2 * size),
    }
    counts = np.array([len(targets) for _, targets, _ in sequences])
    if (counts < batch["lengths"][:, 1] - np.maximum(batch["lengths"][:, 0], 1)).any():
        batch["counts"] = counts
    if placing:
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
    targets, positions, rows = map(np.concatenate, zip(*scored))
    total = total or max(16 * -(-len(targets) // 16), 1)
    filling = (0, total - len(targets))
    rows = np.pad(rows, filling, constant_values=nowhere)
    targets, positions = np.pad(targets, filling), np.pad(positions, filling)
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
    """Count the tokens that a batch needs, and those that it computes."""
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
    num_batches: int = -1,
) -> list[tuple[BatchShape, list[int]]]:
    """The batches of one pass over the data, or a fixed sample, without replacement."""
    rng = None if seed is None else np.random.default_rng([seed, epoch])
    batches = []
    for shape, indices in buckets:
        if rng is not None:
            indices = rng.permutation(indices.reshape(-1, group)).reshape(-1)
        for i in range(0, len(indices), batch_size):
            batches.append((shape, indices[i : i + batch_size].tolist()))
    if rng is not None:
        batches = [batches[i] for i in rng.permutation(len(batches))]
    if 0 < num_batches < len(batches):
        sample = np.linspace(0, len(batches) - 1, num_batches).round()
        batches = [batches[int(i)] for i in sample]
    return batches


def _led_by(batches, shape, count):
    # The others keep their order.
    first = [i for i, batch in enumerate(batches) if batch[0] == shape][:count]
    led = set(first)
    rest = [batch for i, batch in enumerate(batches) if i not in led]
    return [batches[i] for i in first] + rest


def check_enough(dataset: Any, batch_size: int) -> None:
    """Raise unless the pairs fill a batch."""
    pairs = len(dataset)
    if pairs < batch_size:
        raise InputError(
            f"The training set has {pairs} usable pair{'s' * (pairs != 1)}, "
            f"fewer than batch_size={batch_size}. Lower batch_size or add pairs."
        )


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
    lead: tuple[BatchShape, int] | None = None,
    reshape: Callable[[BatchShape], BatchShape] | None = None,
) -> Iterator[PairBatch]:
    """Yield this rank's share of every batch, some of the first of one shape."""
    rank, size = (comm_group.rank(), comm_group.size()) if comm_group else (0, 1)
    group = getattr(dataset, "group_size", 1)
    check_batch_size(batch_size, size, group)
    if loop:
        check_enough(dataset, batch_size)
    if buckets is None:
        buckets = length_buckets(pair_lengths(dataset), batch_size, group=group)
    epoch, first = divmod(first_batch, batches_per_epoch(buckets, batch_size))
    while True:
        batches = epoch_batches(buckets, batch_size, seed, epoch, group, num_batches)
        if lead and epoch == 0:
            batches = _led_by(batches, *lead)
        for shape, indices in batches[first:]:
            shape = reshape(shape) if reshape else shape
            yield _share_of_batch(dataset, indices, batch_size, shape, rank, size)
        if not loop:
            return
        epoch, first = epoch + 1, 0


def value_arrays(
    dataset: Any, indices: list[int], weights: mx.array
) -> dict[str, mx.array]:
    """The numbers that a batch's pairs bring along."""
    counts = np.array(weights) > 0
    found = {}
    for name, values in getattr(dataset, "values", {}).items():
        # Filling is put behind the pairs, as copies of the first.
        rows = values[indices + indices[:1] * (len(counts) - len(indices))]
        if name == "weights":
            # What a pair counts must not depend on the others of its batch.
            rows = rows * counts / _mean_weight(dataset)
        if name == "places":
            rows = np.where(counts[:, None], rows, -1).T.reshape(-1)
        found[name] = mx.array(rows.astype(np.float32))
    return found


def _mean_weight(dataset):
    """What a pair counts on average; a ranking's pairs count together."""
    weights = dataset.values["weights"]
    places = dataset.values.get("places")
    counted = weights > 0 if places is None else (weights > 0) & (places[:, 0] == 0)
    return weights.sum() / counted.sum()


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
