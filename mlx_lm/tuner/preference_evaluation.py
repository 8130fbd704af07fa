# Copyright © 2026 MLX Contributors

"""A pass over held-out pairs, each counted once."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .batch_shape import Bucket
from .memory_plan import trim_cache
from .preference_batches import PairBatch, iterate_preference_batches
from .preference_metrics import add_metrics, all_sum_metrics, mean_metrics


def evaluate_pairs(
    score: Callable[[PairBatch], dict[str, mx.array]],
    policy_model: nn.Module,
    dataset: Any,
    batch_size: int,
    num_batches: int,
    buckets: list[Bucket] | None,
    clear_cache_threshold: int,
    progress_callback: Callable[[], Any] | None,
    hidden: frozenset[str] = frozenset(),
) -> dict[str, float]:
    """
    Score a data set, or a sample of its batches, and average over all ranks.

    Args:
        score (Callable): Sums of a batch's metrics, see ``preference_sums``.
        policy_model (nn.Module): The policy; left in evaluation mode.
        dataset (PreferenceDataset): The pairs.
        batch_size (int): Pairs a batch over all ranks.
        num_batches (int): A fixed sample of so many batches, ``-1`` for all.
        buckets (list, optional): What ``plan_batches`` returned.
        clear_cache_threshold (int): Clear the allocator's cache beyond so many
            bytes.
        progress_callback (Callable, optional): Called after every batch.
        hidden (frozenset): What ``hidden_metrics`` returned. Default: nothing.

    Returns:
        dict: What ``mean_metrics`` returns, and ``pairs``.

    Raises:
        ValueError: If there is nothing to evaluate.

    Example:
        >>> evaluate_pairs(None, None, [], 1, -1, None, 0, None)
        Traceback (most recent call last):
        ...
        ValueError: There are no pairs to evaluate.
    """
    if len(dataset) == 0 or num_batches == 0:
        raise ValueError("There are no pairs to evaluate.")
    policy_model.eval()
    totals: dict[str, mx.array] = {}
    group = mx.distributed.init()
    for batch in iterate_preference_batches(
        dataset, batch_size, buckets, comm_group=group, num_batches=num_batches
    ):
        totals = add_metrics(totals or None, score(batch))
        mx.eval(totals)
        trim_cache(clear_cache_threshold)
        if progress_callback is not None:
            progress_callback()
    totals = all_sum_metrics(totals, group)
    means = {k: v.item() for k, v in mean_metrics(totals, hidden=hidden).items()}
    return means | {"pairs": totals["pairs"].item()}
