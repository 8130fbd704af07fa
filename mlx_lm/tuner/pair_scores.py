# Copyright © 2026 MLX Contributors

"""What policy and reference say of every held-out pair, each scored once."""

from dataclasses import dataclass, fields, replace
from typing import Any

import mlx.core as mx
import numpy as np

from .batch_shape import pair_lengths
from .ranks import sum_over_ranks

CHOSEN, REJECTED = 0, 1


@dataclass(frozen=True, eq=False)
class ScoredPairs:
    """
    The scores of some pairs of a data set, in its order.

    Of two columns the first is the chosen answer and the second the rejected one.

    Args:
        indices (np.ndarray): Where each pair is in the data set. int64, shape:
            ``(n,)``.
        policy_logps (np.ndarray): The policy's log-probs, summed over an answer, in
            nats. float64, like all below. Shape: ``(n, 2)``.
        reference_logps (np.ndarray): The same under the reference.
        kl (np.ndarray): KL(policy || reference) over the whole vocabulary, summed
            over an answer's tokens, in nats. Shape: ``(n, 2)``.
        rewards (np.ndarray): In nats. Shape: ``(n, 2)``.
        tokens (np.ndarray): Scored tokens of each answer. int64, shape: ``(n, 2)``.

    Example:
        >>> two = np.array([[-1.0, -3.0], [-2.0, -1.0]])
        >>> pairs = ScoredPairs(np.arange(2), two, 0 * two, 0 * two, 0.1 * two,
        ...     np.array([[1, 2], [2, 1]]))
        >>> len(pairs), pairs.margins.round(3).tolist()
        (2, [0.2, -0.1])
        >>> pairs.select([1]).policy_logps.tolist()
        [[-2.0, -1.0]]
    """

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
        """
        Take some of the pairs.

        Args:
            which (np.ndarray): Their places here, or a mask.

        Returns:
            ScoredPairs: Those pairs.
        """
        names = [f.name for f in fields(self)]
        return replace(self, **{name: getattr(self, name)[which] for name in names})


class PairCollector:
    """
    Keeps the scores of an evaluation's pairs, whatever batch and rank they are in.

    Args:
        dataset (PreferenceDataset): The pairs.

    Example:
        >>> from mlx_lm.tuner.preference_batches import PairBatch, collate_pairs
        >>> pairs = [([1], [2], [3, 4], (1, 2, 3))]
        >>> collector = PairCollector(pairs)
        >>> values = {"policy_logps": mx.array([-1.0, -2.0])}
        >>> values |= {"reference_logps": mx.zeros((2,)), "kl": mx.zeros((2,))}
        >>> values |= dict.fromkeys(("chosen_rewards", "rejected_rewards"), mx.ones(1))
        >>> collector.add(PairBatch([0], collate_pairs(pairs)), values)
        >>> scored = collector.gather()
        >>> scored.policy_logps.tolist(), scored.tokens.tolist()
        ([[-1.0, -2.0]], [[1, 2]])
    """

    def __init__(self, dataset: Any):
        lengths = np.asarray(pair_lengths(dataset), dtype=np.int64).reshape(-1, 3)
        self._tokens = lengths[:, 1:] - np.maximum(lengths[:, :1], 1)
        shape = (len(lengths), 2)
        names = ("policy_logps", "reference_logps", "kl", "rewards")
        self._arrays = {name: np.zeros(shape, np.float32) for name in names}
        self._counted = np.zeros(len(lengths), np.float32)

    def add(self, batch: Any, values: dict[str, mx.array]) -> None:
        """
        Keep what a batch's pairs scored.

        Args:
            batch (PairBatch): The batch; filling has weight 0 and is left out.
            values (dict): ``policy_logps``, ``reference_logps`` and ``kl``, shape
                ``(2B,)``, and ``chosen_rewards`` and ``rejected_rewards``, ``(B,)``.
        """
        real = np.array(batch.arrays["weights"]) > 0
        indices = np.array(batch.indices)[real]
        rewards = [values["chosen_rewards"], values["rejected_rewards"]]
        rows = {k: values[k].reshape(2, -1) for k in self._arrays if k in values}
        rows["rewards"] = mx.stack(rewards)
        for name, array in rows.items():
            self._arrays[name][indices] = np.array(array.astype(mx.float32)).T[real]
        self._counted[indices] = 1

    def gather(self, group: mx.distributed.Group | None = None) -> ScoredPairs:
        """
        Put the pairs of all ranks together; each of them has to call it.

        Args:
            group (mx.distributed.Group, optional): The ranks. Default: all.

        Returns:
            ScoredPairs: The pairs that were in a batch.
        """
        arrays = {k: mx.array(v) for k, v in self._arrays.items()}
        sums = sum_over_ranks({**arrays, "counted": mx.array(self._counted)}, group)
        found = np.flatnonzero(np.array(sums.pop("counted")))
        return ScoredPairs(
            indices=found,
            tokens=self._tokens[found],
            **{k: np.array(v, dtype=np.float64)[found] for k, v in sums.items()},
        )
