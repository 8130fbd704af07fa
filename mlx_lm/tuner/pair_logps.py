# Copyright © 2026 MLX Contributors

"""What policy and reference say of a batch's pairs, as the losses read it."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class PairLogps:
    """
    What policy and reference say of a batch's pairs.

    All arrays are float32 of shape ``(B,)``, log-probs are summed over an answer,
    in nats. Of labelled data the chosen column is the answer and the rejected one
    an answer to another prompt.

    Args:
        chosen (mx.array): The policy's log-probs of the chosen answers.
        rejected (mx.array): The same of the rejected answers.
        reference_chosen (mx.array): The reference's; zeros where there is none.
        reference_rejected (mx.array): The same of the rejected answers.
        chosen_lengths (mx.array): Tokens that are scored, at least 1.
        rejected_lengths (mx.array): The same of the rejected answers.
        weights (mx.array): 0 for filling, else what the pair counts.
        divergence (Callable, optional): Turns log-ratios into scores, see
            ``DIVERGENCES``. Default: they are the scores.
        margins (mx.array or float): What the chosen score must be ahead.
        labels (mx.array, optional): 1 for a desirable answer, 0 for another.
        places (mx.array, optional): The rank of each answer in its ranking, chosen
            column first, -1 for copies. Shape: ``(2B,)``.

    Example:
        >>> one, none = mx.array([-1.0]), mx.array([0.0])
        >>> pairs = PairLogps(one, 2 * one, none, none, -one, -2 * one, -one)
        >>> pairs.logratios[1].item(), pairs.scores[1].item()
        (-2.0, -2.0)
        >>> pairs.difference.item(), pairs.difference_per_token.item()
        (1.0, 0.0)
    """

    chosen: mx.array
    rejected: mx.array
    reference_chosen: mx.array
    reference_rejected: mx.array
    chosen_lengths: mx.array
    rejected_lengths: mx.array
    weights: mx.array
    divergence: Callable[[mx.array], mx.array] | None = None
    margins: mx.array | float = 0.0
    labels: mx.array | None = None
    places: mx.array | None = None

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
    """
    KTO's estimate of the KL from the reference, from answers to other prompts.

    ``max(0, mean(log pi(y') - log pi_ref(y')))``, without gradient.

    Paper: https://arxiv.org/abs/2402.01306, Section 4.1.

    Args:
        pairs (PairLogps): Labelled answers of all ranks.

    Returns:
        mx.array: A float32 scalar in nats.

    Example:
        >>> one, none = mx.array([1.0]), mx.array([0.0])
        >>> kl_baseline(PairLogps(none, 2 * one, none, none, one, one, one)).item()
        2.0
    """
    real = (pairs.weights > 0).astype(mx.float32)
    mean = (pairs.logratios[1] * real).sum() / mx.maximum(real.sum(), 1)
    return mx.stop_gradient(mx.maximum(mean, 0))
