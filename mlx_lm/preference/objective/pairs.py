# Copyright © 2026 MLX Contributors

"""What the losses read: log-probs of pairs, and log-ratios as a divergence has them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError

LARGEST_EXPONENT = 80.0


def _alpha_score(logratios, alpha):
    if abs(alpha - 1) < 1e-6:
        return logratios
    exponents = mx.minimum((alpha - 1) * logratios, LARGEST_EXPONENT)
    return mx.expm1(exponents) / (alpha - 1)


# f'(t) of f-DPO with t = exp(log-ratio), https://arxiv.org/abs/2309.16240, Table 1, up
# to a constant. Its alpha, of f'(t) = (1 - t^-alpha) / alpha, is 1 - f_alpha.
DIVERGENCES: dict[str, Callable[[mx.array, float], mx.array]] = {
    "reverse_kl": lambda logratios, _: logratios,
    "forward_kl": lambda logratios, _: 1
    - mx.exp(mx.minimum(-logratios, LARGEST_EXPONENT)),
    "js": lambda logratios, _: math.log(2) + nn.log_sigmoid(logratios),
    "alpha": _alpha_score,
}


@dataclass(frozen=True)
class PairLogps:
    """What policy and reference say of a batch's pairs: float32 of shape (B,)."""

    chosen: mx.array  # log-probs summed over an answer, in nats
    rejected: mx.array  # of labelled data, an answer to another prompt
    reference_chosen: mx.array  # zeros where there is no reference
    reference_rejected: mx.array
    chosen_lengths: mx.array  # tokens that are scored, at least 1
    rejected_lengths: mx.array
    weights: mx.array  # 0 for filling, else what the pair counts
    divergence: Callable[[mx.array], mx.array] | None = None
    margins: mx.array | float = 0.0
    labels: mx.array | None = None  # 1 for a desirable answer, 0 for another
    places: mx.array | None = None  # shape (2B,), from 0, -1 for a copy

    @property
    def logratios(self) -> tuple[mx.array, mx.array]:
        """``c`` and ``r``, in nats."""
        chosen = self.chosen - self.reference_chosen
        return chosen, self.rejected - self.reference_rejected

    @property
    def scores(self) -> tuple[mx.array, mx.array]:
        """``c`` and ``r`` as the divergence sees them."""
        chosen, rejected = self.logratios
        if self.divergence is None:
            return chosen, rejected
        return self.divergence(chosen), self.divergence(rejected)

    @property
    def difference(self) -> mx.array:
        """``h``, in nats."""
        chosen, rejected = self.scores
        return chosen - rejected

    @property
    def difference_per_token(self) -> mx.array:
        """``c / |chosen| - r / |rejected|``, in nats a token."""
        chosen, rejected = self.scores
        return chosen / self.chosen_lengths - rejected / self.rejected_lengths


def kl_baseline(pairs: PairLogps) -> mx.array:
    """KTO's estimate of the KL from the reference, from answers to other prompts."""
    real = (pairs.weights > 0).astype(mx.float32)
    mean = (pairs.logratios[1] * real).sum() / mx.maximum(real.sum(), 1)
    return mx.stop_gradient(mx.maximum(mean, 0))


def examples(weights: mx.array, places: mx.array | None = None) -> mx.array:
    """1 for each pair that a batch's mean counts, of a ranking only for its first."""
    counts = (weights > 0).astype(mx.float32)
    return counts if places is None else counts * (mx.split(places, 2)[0] == 0)


def pair_logps(
    policy_logps: mx.array,
    reference_logps: mx.array,
    batch: dict[str, mx.array],
    objective: Any,
) -> PairLogps:
    """Put what the losses read together."""
    kinds = {"labels": "labels", "places": "rankings"}
    given = next((kind for name, kind in kinds.items() if name in batch), "pairs")
    if given != objective.data:
        name = next(iter(objective.losses))
        raise InputError(f"{name} learns from {objective.data}, not from {given}.")
    policy_logps = policy_logps.astype(mx.float32)
    if not objective.needs_reference:
        reference_logps = mx.zeros_like(policy_logps)
    counts = mx.ones_like(policy_logps)
    if "counts" in batch:
        counts = mx.maximum(batch["counts"], 1).astype(mx.float32)
    elif "lengths" in batch:
        lengths = batch["lengths"]
        scored = lengths[:, 1] - mx.maximum(lengths[:, 0], 1)
        counts = mx.maximum(scored, 1).astype(mx.float32)
    divergence = DIVERGENCES[objective.f_divergence]
    # Filling has no tokens but a reference, and infinite times 0 is no number.
    real = mx.concatenate([batch["weights"], batch["weights"]]) > 0
    chosen, rejected = mx.split(mx.where(real, policy_logps, 0), 2)
    reference_logps = mx.where(real, reference_logps, 0)
    reference_chosen, reference_rejected = mx.split(reference_logps, 2)
    chosen_lengths, rejected_lengths = mx.split(counts, 2)
    return PairLogps(
        chosen,
        rejected,
        reference_chosen,
        reference_rejected,
        chosen_lengths,
        rejected_lengths,
        weights=batch["weights"],
        divergence=lambda logratios: divergence(logratios, objective.f_alpha),
        margins=batch.get("margins", 0.0),
        labels=batch.get("labels"),
        places=batch.get("places"),
    )
