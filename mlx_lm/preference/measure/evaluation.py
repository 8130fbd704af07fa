# Copyright © 2026 MLX Contributors

"""What policy and reference say of every held-out pair, each scored once."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..batch.collate import PairBatch, iterate_preference_batches
from ..batch.shape import Bucket
from ..device import trim_cache
from ..errors import InputError
from ..ranks import sum_over_ranks
from .metrics import mean_metrics, sum_values


def evaluate_pairs(
    score: Callable[[PairBatch], tuple[dict[str, mx.array], dict[str, mx.array]]],
    policy_model: nn.Module,
    dataset: Any,
    batch_size: int,
    num_batches: int,
    buckets: list[Bucket] | None,
    clear_cache_threshold: int,
    progress_callback: Callable[[], Any] | None,
    hidden: frozenset[str] = frozenset(),
    keep: Callable[[PairBatch, dict[str, mx.array]], Any] | None = None,
) -> dict[str, float]:
    """Average over pairs and ranks what ``score`` gives: values and their arrays."""
    if len(dataset) == 0 or num_batches == 0:
        raise InputError("There are no pairs to evaluate.")
    policy_model.eval()
    totals: dict[str, mx.array] = {}
    group = mx.distributed.init()
    batches = iterate_preference_batches(
        dataset, batch_size, buckets, comm_group=group, num_batches=num_batches
    )
    for batch, values in _one_ahead(batches, score):
        sums = sum_values(values, batch.arrays)
        if keep is not None:
            keep(batch, values)
        totals = {k: totals.get(k, 0) + x for k, x in sums.items()}
        mx.eval(totals)
        trim_cache(clear_cache_threshold)
        if progress_callback is not None:
            progress_callback()
    totals = sum_over_ranks(totals, group)
    means = {k: v.item() for k, v in mean_metrics(totals, hidden=hidden).items()}
    return means | {"pairs": totals["pairs"].item()}


Scored = tuple[PairBatch, dict[str, mx.array]]


def _one_ahead(batches: Iterable[PairBatch], score: Callable) -> Iterator[Scored]:
    """Score batches: while one is computed, the next one's graph is built."""
    waiting: Scored | None = None
    for batch in batches:
        values, arrays = score(batch)
        if waiting is not None:
            yield waiting
        # Only now, so that one batch at a time takes memory.
        mx.async_eval(values)
        waiting = batch._replace(arrays=arrays), values
    if waiting is not None:
        yield waiting
