# Copyright © 2026 MLX Contributors

"""Which pairs go into one batch: few array shapes and little padding.

A pair has two lengths that matter: the part of its prompt that is computed once
and the rows that follow. Sorting by their sum pads both. So the set is cut in
two, again and again, along the length and at the place that save most padding;
every bucket has one shape, and their number bounds what is compiled.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import InputError
from .shape import (
    PLACED,
    BatchShape,
    Bucket,
    input_lengths,
    padded_tokens,
    pair_lengths,
)

# An estimate of what a token costs where prompts are as wide as attention likes it.
FUSED = 0.9
# What attention adds to a token's cost for each token of its row, as an estimate, where
# its gradient is not fused.
UNFUSED = 1 / 2000
# A share of the tokens that is not worth another cut.
LEAST_SAVING = 1 / 20000
LAYOUTS = ("ragged", "equal", "plain")


def two_lengths(lengths: np.ndarray, layout: str) -> tuple[np.ndarray, tuple]:
    """Two numbers a pair, of which a batch needs the largest, and their prices."""
    shared, longest = lengths[:, 0], lengths[:, 1:].max(axis=1)
    if layout == "ragged":
        return np.stack([shared, longest - shared], axis=1), (1, 2)
    if layout == "equal":
        # All share as many tokens as the shortest prompt has.
        return np.stack([-shared, longest], axis=1), (1, 2)
    return np.stack([0 * shared, longest], axis=1), (0, 2)


def _round_up(x, pad):
    return -(-x // pad) * pad


def _cost(lengths, prices, pad, fused_pad):
    """What batches cost in tokens whose pairs have at most such lengths."""
    padded = _round_up(lengths, pad)
    if fused_pad > pad and not prices[0]:
        near, wide = padded[..., 1], _round_up(lengths[..., 1], fused_pad)
        return prices[1] * np.minimum(near * (1 + near * UNFUSED), wide)
    return (padded * prices).sum(axis=-1)


def _best_cut(features, order, cost, batch_size, smallest):
    """The cut of a bucket that saves most tokens: (saved, one part, the other)."""
    best = (0, None, None)
    size = len(order)
    whole = size * cost(features[order].max(axis=0))
    # Whole batches on one side, so that one batch in all remains short.
    cuts = np.arange(smallest, size - smallest + 1, batch_size)
    if not len(cuts):
        return best
    for axis in range(2):
        ranked = order[np.argsort(features[order, axis], kind="stable")]
        x = features[ranked]
        low = np.maximum.accumulate(x, axis=0)[cuts - 1]
        high = np.maximum.accumulate(x[::-1], axis=0)[::-1][cuts]
        saved = whole - cuts * cost(low) - (size - cuts) * cost(high)
        i = int(saved.argmax())
        if saved[i] > best[0]:
            best = (int(saved[i]), ranked[: cuts[i]], ranked[cuts[i] :])
    return best


def _cut_parts(features, prices, batch_size, pads, min_batches, max_parts):
    """Cut where it saves most, as long as that is worth it."""
    smallest = max(1, min_batches) * batch_size
    cost = lambda lengths: _cost(lengths, prices, *pads)
    cut = lambda order: _best_cut(features, order, cost, batch_size, smallest)
    parts = [np.arange(len(features))]
    cuts = [cut(parts[0])]
    needed = int((np.abs(features) * prices).sum())
    while len(parts) < max_parts:
        i = max(range(len(cuts)), key=lambda j: cuts[j][0])
        saved, low, high = cuts[i]
        if saved <= LEAST_SAVING * needed:
            break
        parts[i : i + 1], cuts[i : i + 1] = [low, high], [cut(low), cut(high)]
    return parts


def _row_width(rows, pad, fused_pad, longest):
    """How wide rows are padded: finely, or to what attention has a fused gradient for."""
    # No row needs to be wider than the longest input that there may be.
    near = max(rows, min(int(_round_up(rows, pad)), longest), 1)
    wide = max(int(_round_up(rows, fused_pad)), 1)
    is_worth_it = wide < near * (1 + near * UNFUSED) and wide <= longest + 1
    return wide if fused_pad > pad and is_worth_it else near


def batch_shape(
    features: np.ndarray,
    layout: str,
    pad: int,
    prompt_pad: int,
    fused_pad: int,
    longest_input: int,
) -> BatchShape:
    """The shape of batches of pairs with such lengths."""
    first, second = (int(x) for x in features.max(axis=0))
    shared = max(-first, 0)
    width = _row_width(second - shared, pad, fused_pad, longest_input - shared)
    if layout == "ragged":
        return BatchShape(int(_round_up(max(first, 1), prompt_pad)), width, ragged=True)
    return BatchShape(int(_round_up(shared, prompt_pad)), width, shared=shared)


def with_scored(bucket: Bucket, lengths: np.ndarray, batch_size: int) -> Bucket:
    """Add the most tokens that any batch of these pairs can score."""
    answers = lengths[bucket.indices, 1:] - np.maximum(lengths[bucket.indices, :1], 1)
    most = np.sort(np.maximum(answers, 0).sum(axis=1))[::-1][:batch_size].sum()
    scored = int(max(_round_up(most, 8), 1))
    return bucket._replace(shape=bucket.shape._replace(scored=scored))


# A run asks several times for the same plan, and a large set takes seconds.
@lru_cache(maxsize=8)
def _cut_buckets(raw, batch_size, layout, options):
    max_shapes, min_batches, *pads, max_length, ranks, group = options
    pad, _, fused_pad = pads
    lengths = np.frombuffer(raw, dtype=np.int64).reshape(-1, 3)
    share = -(-batch_size // ranks)
    if placing := PLACED.get(layout):
        max_shapes, step = placing.cut(max_shapes, batch_size, share)
    features, prices = two_lengths(input_lengths(lengths), layout)
    # Pairs that belong together are cut as one, as long as the longest of them.
    whole, size = features.reshape(-1, group, 2).max(axis=1), batch_size // group
    widths = pad, fused_pad
    parts = _cut_parts(whole, prices, size, widths, min_batches, max_shapes)
    parts = [(part[:, None] * group + np.arange(group)).reshape(-1) for part in parts]
    longest_input = np.iinfo(np.int32).max if max_length is None else max_length - 1
    shapes: dict[BatchShape, list] = {}
    for part in parts:
        shape = batch_shape(features[part], layout, *pads, longest_input)
        shapes.setdefault(shape, []).append(part)
    buckets = [Bucket(k, np.sort(np.concatenate(v))) for k, v in shapes.items()]
    # Before anything that depends on the number of ranks.
    buckets.sort(key=lambda b: (b.shape.prompt + b.shape.width, b.shape, b.indices[0]))
    buckets = [with_scored(b, lengths, share) for b in buckets]
    if placing:
        given = input_lengths(lengths)[:, 1:], share, step, pad, longest_input
        buckets = [placing.widen(bucket, *given) for bucket in buckets]
    return buckets


def check_batch_size(batch_size: int, ranks: int, group: int = 1) -> None:
    """Refuse a batch that can't be divided."""
    if batch_size >= 1 and batch_size % (ranks * group) == 0:
        return
    if group > 1:
        each = f", for each of the {ranks} workers" if ranks > 1 else ""
        raise InputError(
            f"batch_size must be a positive multiple of {ranks * group}: the longest "
            f"ranking takes {group} pairs{each}. It is {batch_size}."
        )
    raise InputError(
        f"batch_size must be a positive multiple of the {ranks} workers, "
        f"got {batch_size}."
    )


def length_buckets(
    lengths: np.ndarray,
    batch_size: int,
    layout: str = "plain",
    *,
    max_shapes: int = 16,
    min_batches: int = 4,
    pad: int = 1,
    prompt_pad: int = 1,
    fused_pad: int = 1,
    max_length: int | None = None,
    ranks: int = 1,
    group: int = 1,
) -> list[Bucket]:
    """Cut a data set into buckets of one batch shape each, with little padding."""
    check_batch_size(batch_size, ranks, group)
    raw = np.asarray(lengths, dtype=np.int64).tobytes()
    pads = pad, prompt_pad, fused_pad
    options = (max_shapes, min_batches, *pads, max_length, ranks, group)
    return list(_cut_buckets(raw, batch_size, layout, options))


def plan_batches(
    dataset: Any,
    batch_size: int,
    grade: str = "plain",
    *,
    pad: int = 1,
    prompt_pad: int = 1,
    shared_price: float = 1.0,
    **options: Any,
) -> list[Bucket]:
    """Choose how a data set's prompts are shared, and bucket it."""
    if grade not in (known := (*LAYOUTS, *PLACED)):
        raise InputError(f"Unknown sharing {grade!r}, choose from {', '.join(known)}.")
    lengths = pair_lengths(dataset)
    layouts = [grade] if grade in PLACED else LAYOUTS[LAYOUTS.index(grade) :]
    # Whole prompts bear tokens behind them, others don't.
    pads = {prompt_pad, pad} if grade == "ragged" else {1}
    options |= {"pad": pad, "group": getattr(dataset, "group_size", 1)}
    plans = [
        length_buckets(lengths, batch_size, layout, prompt_pad=own_pad, **options)
        for own_pad in sorted(pads, reverse=True)
        for layout in layouts
    ]

    def price(plan):
        tokens = padded_tokens(plan, batch_size, lengths)
        # Ragged prompts need a mask in every layer, so they must save something.
        tokens *= 1.05 if plan[0].shape.ragged else 1
        tokens *= shared_price if plan[0].shape.layout != "plain" else 1
        # Wide prompts are padded for a quicker attention.
        wide = all(b.shape.prompt and b.shape.prompt % prompt_pad == 0 for b in plan)
        return tokens * (FUSED if wide and prompt_pad > pad else 1)

    return min(reversed(plans), key=price)
