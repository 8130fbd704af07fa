# Copyright © 2026 MLX Contributors

"""Whether a policy is as sure of its preferences as it is right about them.

A reward margin m says that the chosen answer is preferred with probability
``sigmoid(m)`` (Bradley and Terry 1952). A policy that is its own reference has no
margins: it says 0.5 of every pair, which is calibrated (ECE 0) and knows nothing
(Brier score 0.25). So "before" is that baseline, whatever the model: a score above
0.25 is worse than saying nothing. The start's own log-probs are no substitute. The
difference of two sums over many tokens is tens of nats, and no scale of it was
ever fitted to preferences.
"""

from dataclasses import dataclass

import numpy as np


def preference_probabilities(margins: np.ndarray) -> np.ndarray:
    """
    The probability that the chosen answer is preferred: ``sigmoid(margin)``.

    Paper: https://arxiv.org/abs/2305.18290, Eq. 6.

    Args:
        margins (np.ndarray): Reward margins in nats. Shape: ``(n,)``.

    Returns:
        np.ndarray: Probabilities. float64, shape: ``(n,)``.

    Example:
        >>> preference_probabilities(np.array([0.0, 2.0, -800.0])).round(3).tolist()
        [0.5, 0.881, 0.0]
    """
    # exp(-log(1 + exp(-m))): no overflow at either end.
    return np.exp(-np.logaddexp(0.0, -np.asarray(margins, dtype=np.float64)))


@dataclass(frozen=True, eq=False)
class Reliability:
    """
    A reliability curve: in bins of confidence, how often the policy was right.

    Args:
        confidence (np.ndarray): Mean confidence of each bin, NaN where it is empty.
            Shape: ``(bins,)``.
        accuracy (np.ndarray): Share of right pairs, NaN where it is empty.
        pairs (np.ndarray): How many there are. int64.

    Example:
        >>> curve = reliability_curve(np.array([0.9, 0.2]), bins=2)
        >>> curve.pairs.tolist()
        [0, 2]
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    pairs: np.ndarray


def reliability_curve(probabilities: np.ndarray, bins: int = 10) -> Reliability:
    """
    Sort pairs by confidence, and count in each bin how often the policy is right.

    The confidence is that in the preferred one of two answers, ``max(p, 1 - p)``.
    It is never below 0.5, so the bins part the range from 0.5 to 1 evenly. With
    ``p`` of exactly 0.5 nothing is preferred: half a pair is right.

    Paper: https://arxiv.org/abs/1706.04599, Sec. 2.

    Args:
        probabilities (np.ndarray): P(chosen) of each pair. Shape: ``(n,)``.
        bins (int): How many. Default: ``10``.

    Returns:
        Reliability: The curve.

    Example:
        >>> curve = reliability_curve(np.array([0.9, 0.95, 0.05]), bins=5)
        >>> curve.pairs.tolist(), curve.accuracy[-1].round(3).item()
        ([0, 0, 0, 0, 3], 0.667)
    """
    p = np.asarray(probabilities, dtype=np.float64)
    confidence = np.maximum(p, 1 - p)
    right = np.where(p == 0.5, 0.5, p > 0.5)
    # Bins hold their lower edge; 1 is in the last one.
    edges = np.linspace(0.5, 1.0, bins + 1)[1:-1]
    place = np.searchsorted(edges, confidence, side="right")
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [
            np.bincount(place, weights=x, minlength=bins) / counts
            for x in (confidence, right)
        ]
    return Reliability(means[0], means[1], counts)


def expected_calibration_error(curve: Reliability) -> float:
    """
    ECE: the gap between confidence and accuracy, averaged over all pairs.

    ``sum over bins of n_b / n * |accuracy_b - confidence_b|``

    Paper: https://arxiv.org/abs/1706.04599, Eq. 3.

    Args:
        curve (Reliability): What ``reliability_curve`` returned.

    Returns:
        float: From 0, calibrated, to 1. NaN without pairs.

    Example:
        >>> curve = reliability_curve(np.array([0.75, 0.75, 0.75, 0.25]))
        >>> expected_calibration_error(curve)
        0.0
    """
    filled = curve.pairs > 0
    if not filled.any():
        return float("nan")
    gaps = np.abs(curve.accuracy - curve.confidence)[filled]
    return float(np.average(gaps, weights=curve.pairs[filled]))


def brier_score(probabilities: np.ndarray) -> float:
    """
    The mean squared error of the probabilities: ``mean of (1 - P(chosen))^2``.

    Paper: Brier 1950, Verification of forecasts expressed in terms of probability,
    https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2, for one of its
    two equal terms.

    Args:
        probabilities (np.ndarray): P(chosen) of each pair. Shape: ``(n,)``.

    Returns:
        float: 0 is perfect, 0.25 that of saying 0.5 of all pairs, 1 always wrong.

    Example:
        >>> brier_score(np.array([0.5, 0.5])), brier_score(np.array([1.0, 0.0]))
        (0.25, 0.5)
    """
    return float(np.mean((1 - np.asarray(probabilities, dtype=np.float64)) ** 2))
