# Copyright © 2026 MLX Contributors

"""The metrics of a run from one report to the next."""

import mlx.core as mx

from .preference_metrics import SUMS, add_metrics, all_sum_metrics, mean_metrics

_UNTIMED = ("untimed/pairs", "untimed/tokens")


class MetricsWindow:
    """
    What happened since the last report, and counts over the whole run.

    Args:
        hidden (frozenset): Metrics that are not reported, see ``hidden_metrics``.

    Example:
        >>> window = MetricsWindow()
        >>> window.seconds
        0.0
    """

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
        """
        The numbers that ``restore`` takes, beside the sums.

        Returns:
            dict: Counts by name.

        Example:
            >>> MetricsWindow().counts()["padded"]
            0
        """
        return {
            "real": self.real,
            "padded": self.padded,
            "trained_pairs": self.trained_pairs,
            "trained_tokens": self.trained_tokens,
        }

    def restore(self, counts: dict[str, float], sums: dict[str, mx.array]) -> None:
        """
        Go on where another window was.

        Args:
            counts (dict): What ``counts`` returned.
            sums (dict): Its sums.

        Example:
            >>> window = MetricsWindow()
            >>> window.restore(MetricsWindow().counts() | {"real": 5}, {})
            >>> window.real
            5
        """
        vars(self).update(counts)
        self.sums = dict(sums) or None

    def add(self, sums: dict[str, mx.array], real: int, padded: int) -> None:
        """
        Add a batch, without waiting for the device.

        Args:
            sums (dict): What ``preference_sums`` returned.
            real (int): Tokens that the batch needs, a shared prompt once.
            padded (int): Tokens that it computes, padding included.

        Example:
            >>> window = MetricsWindow()
            >>> window.add({"pairs": mx.array(1.0)}, 48, 64)
            >>> window.padded
            64
        """
        self.sums = add_metrics(self.sums, sums)
        self.real += real
        self.padded += padded

    def time(self, seconds: float, sums: dict | None = None) -> None:
        """
        Add the time of a step.

        Args:
            seconds (float): How long it took.
            sums (dict, optional): Its sums, if it compiled a new shape: neither its
                time nor its pairs count for the speed then.

        Example:
            >>> window = MetricsWindow()
            >>> window.time(2.0, {"pairs": mx.array(1.0), "tokens/all": mx.array(8.0)})
            >>> window.time(0.5)
            >>> window.seconds, window.compile_seconds
            (0.5, 2.0)
        """
        if sums is None:
            self.seconds += seconds
            return
        self.compile_seconds += seconds
        for i, name in enumerate(("pairs", "tokens/all")):
            self.untimed[i] += sums[name].item()

    def report(self, group: mx.distributed.Group | None = None) -> dict[str, float]:
        """
        Average over all ranks and start a new window.

        Args:
            group (mx.distributed.Group, optional): The ranks. Default: all.

        Returns:
            dict: The averages; ``pairs_per_second`` and ``tokens_per_second``
            (of real tokens), ``padding`` as a share of all tokens,
            ``trained_pairs`` and ``trained_tokens`` so far, ``peak_memory`` in
            GB.

        Example:
            >>> from mlx_lm.tuner.preference_metrics import preference_sums
            >>> window, one, lengths = MetricsWindow(), mx.ones((1,)), mx.ones((2, 2))
            >>> batch = (one, one, one, mx.ones((2,)), mx.ones((2,)), lengths, one)
            >>> window.add(preference_sums(*batch), 2, 4)
            >>> window.report()["padding"]
            0.5
        """
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
