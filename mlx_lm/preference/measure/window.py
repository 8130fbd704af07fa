# Copyright © 2026 MLX Contributors

"""What happened since the last report: averages, speed, the gradient's norm."""

from typing import Any

import mlx.core as mx

from ..ranks import sum_over_ranks
from .metrics import SUMS, mean_metrics

# Steps that compiled a new shape tell nothing about the speed.
UNTIMED = {"untimed/pairs": "pairs", "untimed/tokens": "tokens/all"}


class MetricsWindow:
    """What happened since the last report, and counts over the whole run."""

    def __init__(self, hidden: frozenset[str] = frozenset()) -> None:
        self.hidden = hidden
        self.trained_pairs = self.trained_tokens = 0.0
        self._clear()

    def _clear(self) -> None:
        # A window whose every step was skipped has nothing but names.
        names = (*SUMS, "real", "padded", *UNTIMED)
        self.sums = dict.fromkeys(names, mx.array(0.0))
        self.seconds = self.compile_seconds = 0.0

    def state_dict(self) -> tuple[dict[str, mx.array], dict[str, float]]:
        """What a checkpoint holds of it."""
        names = ("trained_pairs", "trained_tokens", "seconds", "compile_seconds")
        return self.sums, {name: getattr(self, name) for name in names}

    def load_state_dict(
        self, arrays: dict[str, mx.array], info: dict[str, float]
    ) -> None:
        """Go on where another window was."""
        self.sums = arrays
        vars(self).update(info)

    def add(self, sums: dict[str, mx.array], real: int, padded: int) -> None:
        """Add a batch, without waiting for the device."""
        self._add({**sums, "real": real, "padded": padded})

    def _add(self, more):
        self.sums |= {name: self.sums[name] + x for name, x in more.items()}

    def time(self, seconds: float, sums: dict | None = None) -> None:
        """Add the time of a step; its sums if it compiled a new shape."""
        if sums is None:
            self.seconds += seconds
        else:
            self.compile_seconds += seconds
            self._add({name: sums[which] for name, which in UNTIMED.items()})

    def report(self, group: mx.distributed.Group | None = None) -> dict[str, float]:
        """Average over all ranks and start a new window."""
        sums = sum_over_ranks(self.sums, group)
        means = mean_metrics(sums, hidden=self.hidden)
        pairs, tokens = sums["pairs"].item(), sums["tokens/all"].item()
        timed = [pairs, tokens]
        if self.seconds:
            timed = [n - sums[name].item() for n, name in zip(timed, UNTIMED)]
        self.trained_pairs += pairs
        self.trained_tokens += tokens
        seconds = max(self.seconds or self.compile_seconds, 1e-9)
        report = {k: v.item() for k, v in means.items()} | {
            "pairs_per_second": timed[0] / seconds,
            "tokens_per_second": timed[1] / seconds,
            "compile_seconds": self.compile_seconds,
            "padding": 1 - sums["real"].item() / max(sums["padded"].item(), 1.0),
            "trained_pairs": self.trained_pairs,
            "trained_tokens": self.trained_tokens,
            "peak_memory": mx.get_peak_memory() / 1e9,
        }
        self._clear()
        return report


class LastGradient:
    """The norm of the last update."""

    def __init__(self) -> None:
        self.norm = mx.array(mx.nan)

    def state_dict(self) -> tuple[dict[str, mx.array], dict[str, Any]]:
        """What a checkpoint holds of it."""
        return {"norm": self.norm}, {}

    def load_state_dict(
        self, arrays: dict[str, mx.array], info: dict[str, Any]
    ) -> None:
        """Go on where another run was."""
        self.norm = arrays["norm"]
