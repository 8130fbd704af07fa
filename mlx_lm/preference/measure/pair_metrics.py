# Copyright © 2026 MLX Contributors

"""What a test reports, from the scores of every pair."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..objective.objective import Objective
from .pair_scores import CHOSEN, REJECTED, ScoredPairs


def preference_probabilities(margins: np.ndarray) -> np.ndarray:
    """The probability that the chosen answer is preferred: ``sigmoid(margin)``."""
    # exp(-log(1 + exp(-m))): no overflow at either end.
    return np.exp(-np.logaddexp(0.0, -np.asarray(margins, dtype=np.float64)))


class Reliability(NamedTuple):
    """A reliability curve: in bins of confidence, how often the policy was right."""

    confidence: np.ndarray
    accuracy: np.ndarray
    pairs: np.ndarray


def reliability_curve(probabilities: np.ndarray, bins: int = 10) -> Reliability:
    """Sort pairs by confidence, and count in each bin how often the policy is right."""
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
    """ECE: the gap between confidence and accuracy, averaged over all pairs."""
    filled = curve.pairs > 0
    if not filled.any():
        return float("nan")
    gaps = np.abs(curve.accuracy - curve.confidence)[filled]
    return float(np.average(gaps, weights=curve.pairs[filled]))


def brier_score(probabilities: np.ndarray) -> float:
    """The mean squared error of the probabilities: ``mean of (1 - P(chosen))^2``."""
    return float(np.mean((1 - np.asarray(probabilities, dtype=np.float64)) ** 2))


FILE_NAME = "test_metrics.json"
# Of the longer answer: what is nearer than this counts as equally long.
EQUAL_LENGTH = 0.1
LENGTH_GROUPS = {
    "chosen_shorter": "chosen is shorter",
    "equal_length": "about as long",
    "chosen_longer": "chosen is longer",
}


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share, by Wilson's score."""
    if not count:
        return 0.0, 1.0
    z = 1.959963984540054
    center = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    ends = ((center + sign * spread) / (1 + z * z / count) for sign in (-1, 1))
    low, high = (min(max(end, 0.0), 1.0) for end in ends)
    return low, high


def length_groups(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Part pairs by which answer is longer."""
    chosen, rejected = tokens[:, CHOSEN], tokens[:, REJECTED]
    equal = np.abs(chosen - rejected) <= EQUAL_LENGTH * tokens.max(axis=1)
    masks = (~equal & (chosen < rejected), equal, ~equal & (chosen > rejected))
    return dict(zip(LENGTH_GROUPS, masks))


def _calibration(margins, prefix=""):
    probabilities = preference_probabilities(margins)
    curve = reliability_curve(probabilities)
    empty_as_none = lambda x: [None if math.isnan(v) else v for v in x.tolist()]
    return {
        f"{prefix}calibration/ece": expected_calibration_error(curve),
        f"{prefix}calibration/brier": brier_score(probabilities),
        f"{prefix}calibration/confidence": empty_as_none(curve.confidence),
        f"{prefix}calibration/accuracy": empty_as_none(curve.accuracy),
        f"{prefix}calibration/pairs": curve.pairs.tolist(),
    }


def _by_length(pairs):
    metrics = {}
    sources = {
        "rewards": pairs.rewards,
        "logps": pairs.policy_logps,
        "reference_logps": pairs.reference_logps,
    }
    for name, mask in length_groups(pairs.tokens).items():
        metrics[f"pairs/{name}"] = int(mask.sum())
        for source, x in sources.items():
            right = (x[:, CHOSEN] > x[:, REJECTED])[mask]
            if len(right):
                metrics[f"{source}/accuracies/{name}"] = float(right.mean())
    return metrics


def pair_metrics(
    means: Mapping[str, float], pairs: ScoredPairs, objective: Objective = Objective()
) -> dict[str, Any]:
    """Everything that a test reports, by flat names."""
    metrics: dict[str, Any] = dict(means)
    ends = wilson_interval(metrics["rewards/accuracies"], round(metrics["pairs"]))
    metrics |= zip(("rewards/accuracies_low", "rewards/accuracies_high"), ends)
    if objective.data != "pairs":
        return metrics
    tokens = np.maximum(pairs.tokens.sum(axis=0), 1)
    for column, name in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
        metrics[f"kl/{name}"] = float(pairs.kl[:, column].sum() / tokens[column])
        metrics[f"kl_per_answer/{name}"] = float(pairs.kl[:, column].mean())
    metrics |= _by_length(pairs) | _calibration(pairs.margins)
    if objective.rewards_are == "log-ratios":
        metrics |= _calibration(0 * pairs.margins, "reference_")
    return metrics
