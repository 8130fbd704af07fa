# Copyright © 2026 MLX Contributors

"""What policy and reference say of every held-out pair, each scored once."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..batch.collate import PairBatch, iterate_preference_batches
from ..batch.shape import Bucket, pair_lengths
from ..device import trim_cache
from ..errors import InputError
from ..ranks import sum_over_ranks
from .metrics import mean_metrics, sum_values

CHOSEN, REJECTED = 0, 1


@dataclass(frozen=True, eq=False)
class ScoredPairs:
    """The scores of some pairs of a data set, in its order."""

    indices: np.ndarray
    policy_logps: np.ndarray
    reference_logps: np.ndarray
    kl: np.ndarray
    rewards: np.ndarray
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def margins(self) -> np.ndarray:
        """Chosen reward - rejected reward, in nats. Shape: ``(n,)``."""
        return self.rewards[:, CHOSEN] - self.rewards[:, REJECTED]

    def select(self, which: Any) -> "ScoredPairs":
        """Take some of the pairs."""
        return ScoredPairs(**{name: x[which] for name, x in vars(self).items()})


class PairCollector:
    """Keeps the scores of an evaluation's pairs, of any batch and rank."""

    def __init__(self, dataset: Any):
        lengths = np.asarray(pair_lengths(dataset), dtype=np.int64).reshape(-1, 3)
        self._tokens = lengths[:, 1:] - np.maximum(lengths[:, :1], 1)
        if hasattr(dataset, "unscored"):
            self._tokens = self._tokens - dataset.unscored
        shape = (len(lengths), 2)
        names = ("policy_logps", "reference_logps", "kl", "rewards", "counted")
        self._arrays = {name: np.zeros(shape, np.float32) for name in names}

    def add(self, batch: Any, values: dict[str, mx.array]) -> None:
        """Keep what a batch's pairs scored."""
        real = np.array(batch.arrays["weights"]) > 0
        indices = np.array(batch.indices)[real]
        rewards = [values["chosen_rewards"], values["rejected_rewards"]]
        rows = {k: values[k].reshape(2, -1) for k in self._arrays if k in values}
        rows["rewards"] = mx.stack(rewards)
        rows["counted"] = mx.ones_like(rows["rewards"])
        for name, array in rows.items():
            self._arrays[name][indices] = np.array(array.astype(mx.float32)).T[real]

    def gather(self, group: mx.distributed.Group | None = None) -> ScoredPairs:
        """Put the pairs of all ranks together; each of them has to call it."""
        sums = sum_over_ranks({k: mx.array(v) for k, v in self._arrays.items()}, group)
        found = np.flatnonzero(np.array(sums.pop("counted"))[:, CHOSEN])
        return ScoredPairs(
            indices=found,
            tokens=self._tokens[found],
            **{k: np.array(v, dtype=np.float64)[found] for k, v in sums.items()},
        )


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
