# Copyright © 2026 MLX Contributors

"""What happened since the last report: averages, speed, each module's gradient."""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .metrics import SUMS, add_metrics, all_sum_metrics, mean_metrics

_UNTIMED = ("untimed/pairs", "untimed/tokens")


class MetricsWindow:
    """What happened since the last report, and counts over the whole run."""

    def __init__(self, hidden: frozenset[str] = frozenset()) -> None:
        self.hidden = hidden
        self.trained_pairs = self.trained_tokens = 0.0
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, mx.array] | None = None
        self.real, self.padded, self.seconds = 0, 0, 0.0
        # Steps that compiled a new shape tell nothing about the speed.
        self.compile_seconds, self.untimed = 0.0, [0.0, 0.0]

    def counts(self) -> dict[str, float]:
        """The numbers that ``restore`` takes, beside the sums."""
        return {
            "real": self.real,
            "padded": self.padded,
            "trained_pairs": self.trained_pairs,
            "trained_tokens": self.trained_tokens,
        }

    def restore(self, counts: dict[str, float], sums: dict[str, mx.array]) -> None:
        """Go on where another window was."""
        vars(self).update(counts)
        self.sums = dict(sums) or None

    def add(self, sums: dict[str, mx.array], real: int, padded: int) -> None:
        """Add a batch, without waiting for the device."""
        self.sums = add_metrics(self.sums, sums)
        self.real += real
        self.padded += padded

    def time(self, seconds: float, sums: dict | None = None) -> None:
        """Add the time of a step."""
        if sums is None:
            self.seconds += seconds
            return
        self.compile_seconds += seconds
        for i, name in enumerate(("pairs", "tokens/all")):
            self.untimed[i] += sums[name].item()

    def report(self, group: mx.distributed.Group | None = None) -> dict[str, float]:
        """Average over all ranks and start a new window."""
        counts: dict[str, float] = {"real": self.real, "padded": self.padded}
        counts |= dict(zip(_UNTIMED, self.untimed))
        computed = {k: mx.array(float(v)) for k, v in counts.items()}
        # A window whose every step was skipped has nothing but names.
        sums = self.sums or dict.fromkeys(SUMS, mx.array(0.0))
        sums = all_sum_metrics({**sums, **computed}, group)
        means = mean_metrics(sums, hidden=self.hidden)
        pairs, tokens = sums["pairs"].item(), sums["tokens/all"].item()
        timed = [pairs, tokens]
        if self.seconds and any(self.untimed):
            timed = [n - sums[k].item() for n, k in zip(timed, _UNTIMED)]
        self.trained_pairs += pairs
        self.trained_tokens += tokens
        compile_seconds = self.compile_seconds
        seconds = max(self.seconds or compile_seconds, 1e-9)
        padding = 1 - sums["real"].item() / max(sums["padded"].item(), 1.0)
        self._clear()
        return {k: v.item() for k, v in means.items()} | {
            "pairs_per_second": timed[0] / seconds,
            "tokens_per_second": timed[1] / seconds,
            "compile_seconds": compile_seconds,
            "padding": padding,
            "trained_pairs": self.trained_pairs,
            "trained_tokens": self.trained_tokens,
            "peak_memory": mx.get_peak_memory() / 1e9,
        }


def _by_module(tree):
    modules: dict[str, list[np.ndarray]] = {}
    for name, x in tree_flatten(tree):
        module = name.rpartition(".")[0] or name
        modules.setdefault(module, []).append(np.array(x, dtype=np.float32).ravel())
    return {name: np.concatenate(parts) for name, parts in modules.items()}


def gradient_report(
    gradients: Any, before: Any, after: Any
) -> dict[str, dict[str, float]]:
    """Describe the gradient of every trained module."""
    old, new = _by_module(before), _by_module(after)
    report = {}
    for name, gradient in _by_module(gradients).items():
        sizes = np.abs(gradient)
        weights = float(np.linalg.norm(old[name]))
        change = float(np.linalg.norm(new[name] - old[name]))
        report[name] = {
            "norm": float(np.linalg.norm(gradient)),
            "largest": float(sizes.max()),
            "median": float(np.median(sizes)),
            "p99": float(np.percentile(sizes, 99)),
            "zeros": float((sizes == 0).mean()),
            "update_ratio": change / weights if weights else 0.0,
        }
    return report
