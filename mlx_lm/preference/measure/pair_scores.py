# Copyright © 2026 MLX Contributors

"""What policy and reference say of each held-out pair, kept."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..batch.shape import pair_lengths
from ..ranks import sum_over_ranks

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
