# Copyright © 2026 MLX Contributors

"""What a test reports, from the scores of every pair."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .atomic_files import replace_file, writing
from .calibration import (
    brier_score,
    expected_calibration_error,
    preference_probabilities,
    reliability_curve,
)
from .pair_scores import CHOSEN, REJECTED, ScoredPairs

FILE_NAME = "test_metrics.json"
# Of the longer answer: what is nearer than this counts as equally long.
EQUAL_LENGTH = 0.1
LENGTH_GROUPS = ("chosen_shorter", "equal_length", "chosen_longer")


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """
    The 95 % confidence interval of a share, by Wilson's score.

    Unlike share +- 1.96 standard errors it never leaves 0 to 1, and has a width
    where all are right.

    Paper: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953

    Args:
        share (float): From 0 to 1.
        count (int): Of so many.

    Returns:
        tuple: Its lower and upper end; 0 and 1 if ``count`` is 0.

    Example:
        >>> [round(x, 3) for x in wilson_interval(0.5, 100)]
        [0.404, 0.596]
        >>> [round(x, 3) for x in wilson_interval(1.0, 60)]
        [0.94, 1.0]
    """
    if not count:
        return 0.0, 1.0
    z = 1.959963984540054
    center = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    ends = ((center + sign * spread) / (1 + z * z / count) for sign in (-1, 1))
    low, high = (min(max(end, 0.0), 1.0) for end in ends)
    return low, high


def length_groups(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """
    Part pairs by which answer is longer.

    Lengths that differ by at most a tenth of the longer one count as equal.

    Args:
        tokens (np.ndarray): Lengths of chosen and rejected answer. Shape:
            ``(n, 2)``.

    Returns:
        dict: For each of ``LENGTH_GROUPS`` a mask of shape ``(n,)``.

    Example:
        >>> groups = length_groups(np.array([[20, 40], [38, 40], [50, 40]]))
        >>> [mask.tolist() for mask in groups.values()]
        [[True, False, False], [False, True, False], [False, False, True]]
    """
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
    means: Mapping[str, float],
    pairs: ScoredPairs,
    data: str = "pairs",
    from_reference: bool = True,
) -> dict[str, Any]:
    """
    Everything that a test reports, by flat names.

    Args:
        means (dict): What ``evaluate_dpo`` returned.
        pairs (ScoredPairs): The same evaluation's pairs.
        data (str): What the rows are, see ``Objective.data``. Labelled answers and
            rankings have no chosen and rejected answer to compare: they only get
            the averages and the interval.
        from_reference (bool): Whether rewards are measured from the reference, which
            then has none itself. Default: ``True``.

    Returns:
        dict: Numbers, and lists of ten for reliability curves, None in empty bins.

    Example:
        >>> two = np.array([[-1.0, -3.0], [-2.0, -1.0]])
        >>> pairs = ScoredPairs(np.arange(2), two, 0 * two, 1 + 0 * two, 0.1 * two,
        ...     np.array([[1, 2], [2, 1]]))
        >>> metrics = pair_metrics({"rewards/accuracies": 0.5, "pairs": 2.0}, pairs)
        >>> metrics["rewards/accuracies/chosen_shorter"], metrics["kl_per_answer/chosen"]
        (1.0, 1.0)
        >>> metrics["reference_calibration/brier"]
        0.25
    """
    metrics: dict[str, Any] = dict(means)
    share, count = metrics["rewards/accuracies"], round(metrics["pairs"])
    ends = wilson_interval(share, count)
    metrics |= zip(("rewards/accuracies_low", "rewards/accuracies_high"), ends)
    if data != "pairs":
        return metrics
    tokens = np.maximum(pairs.tokens.sum(axis=0), 1)
    for column, name in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
        metrics[f"kl/{name}"] = float(pairs.kl[:, column].sum() / tokens[column])
        metrics[f"kl_per_answer/{name}"] = float(pairs.kl[:, column].mean())
    metrics |= _by_length(pairs) | _calibration(pairs.margins)
    if from_reference:
        metrics |= _calibration(0 * pairs.margins, "reference_")
    return metrics


def write_test_metrics(folder: str | Path, metrics: Mapping[str, Any]) -> None:
    """
    Write a test's metrics to ``test_metrics.json``, completely or not at all.

    Args:
        folder (str or Path): The adapter's folder.
        metrics (dict): What ``pair_metrics`` returned. What is not finite becomes
            ``null``.

    Raises:
        OSError: If the folder can't be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_test_metrics(folder, {"loss": float("nan"), "pairs": 2.0})
        ...     json.loads((Path(folder) / FILE_NAME).read_text())
        {'loss': None, 'pairs': 2.0}
    """
    finite = lambda x: not isinstance(x, float) or math.isfinite(x)
    content = {k: v if finite(v) else None for k, v in metrics.items()}
    text = json.dumps(content, indent=2) + "\n"
    path = Path(folder) / FILE_NAME
    with writing(path):
        replace_file(path, lambda name: Path(name).write_text(text, "utf-8"))
