# Copyright © 2026 MLX Contributors

"""What a preference run reports, as sums that can be added and then averaged."""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..objective.objective import Objective

# What a metric is averaged over.
PER_PAIR = (
    "rewards/accuracies",
    "logps/accuracies",
    "logps/accuracies_per_token",
    "reference_logps/accuracies",
    "reference_logps/accuracies_per_token",
)
PER_CHOSEN = ("rewards/chosen", "logps/chosen")
PER_REJECTED = ("rewards/rejected", "logps/rejected")
OF_REFERENCE = (
    "reference_logps/accuracies",
    "reference_logps/accuracies_per_token",
    "perplexity/reference",
    "kl_estimate",
)
OF_TWO_ANSWERS = (
    "logps/accuracies",
    "logps/accuracies_per_token",
    "reference_logps/accuracies",
    "reference_logps/accuracies_per_token",
)
SUMS = (
    *PER_PAIR,
    *PER_CHOSEN,
    *PER_REJECTED,
    "loss",
    "kl_estimate",
    "nll/policy",
    "nll/reference",
    "tokens/chosen",
    "tokens/completion",
    "tokens/all",
    "pairs",
    "chosen",
    "rejected",
)


def preference_sums(
    losses: mx.array,
    chosen_rewards: mx.array,
    rejected_rewards: mx.array,
    policy_logps: mx.array,
    reference_logps: mx.array,
    lengths: mx.array,
    weights: mx.array,
    kl: mx.array | None = None,
    labels: mx.array | None = None,
    baseline: mx.array | None = None,
) -> dict[str, mx.array]:
    """Sum a batch's metrics over its pairs."""
    policy, real = mx.stop_gradient(policy_logps), (weights > 0).astype(mx.float32)
    counts = (lengths[:, 1] - mx.maximum(lengths[:, 0], 1)).astype(mx.float32)
    sums = {"loss": (mx.stop_gradient(losses) * weights).sum()}
    sums |= _compare(policy, reference_logps, counts, real)
    if labels is None:
        is_chosen, is_rejected = real, real
        right = chosen_rewards > rejected_rewards
        rows = mx.concatenate([real, real])
    else:
        is_chosen, is_rejected = real * labels, real * (1 - labels)
        rejected_rewards = chosen_rewards
        above = chosen_rewards - (0.0 if baseline is None else baseline)
        # At the start all are at it: none is right, as among pairs.
        right = mx.where(labels > 0, above, -above) > 0
        # The second half of the rows is there for the baseline alone.
        rows = mx.concatenate([real, mx.zeros_like(real)])
    chosen, rejected = mx.split(policy, 2)
    sums["rewards/accuracies"] = (right * real).sum()
    sums["rewards/chosen"] = (chosen_rewards * is_chosen).sum()
    sums["rewards/rejected"] = (rejected_rewards * is_rejected).sum()
    sums["logps/chosen"] = (chosen * is_chosen).sum()
    sums["logps/rejected"] = (
        (rejected if labels is None else chosen) * is_rejected
    ).sum()
    if kl is None:
        # Half the squared log-ratio: Schulman's k2, on the data's answers.
        sums["kl_estimate"] = (0.5 * (policy - reference_logps) ** 2 * rows).sum()
    else:
        sums["kl"] = (mx.stop_gradient(kl) * rows).sum()
    likely = mx.concatenate([is_chosen, mx.zeros_like(is_chosen)])
    sums["nll/policy"] = -(policy * likely).sum()
    sums["nll/reference"] = -(reference_logps * likely).sum()
    sums["tokens/chosen"] = (counts * likely).sum()
    sums["tokens/completion"] = (counts * rows).sum()
    sums["tokens/all"] = (lengths[:, 1] * rows).sum()
    totals = {"pairs": real, "chosen": is_chosen, "rejected": is_rejected}
    return sums | {k: v.sum() for k, v in totals.items()}


def _compare(policy, reference_logps, counts, real):
    """How often the chosen answer is the likelier one, summed and per token."""
    sums = {}
    for name, logps in (("logps", policy), ("reference_logps", reference_logps)):
        per_token = logps / mx.maximum(counts, 1)
        for suffix, x in (("", logps), ("_per_token", per_token)):
            chosen, rejected = mx.split(x, 2)
            sums[f"{name}/accuracies{suffix}"] = ((chosen > rejected) * real).sum()
    return sums


def metric_columns(batch: dict[str, mx.array]) -> dict[str, mx.array]:
    """What ``preference_sums`` takes of a batch itself."""
    return {k: batch[k] for k in ("lengths", "weights", "labels") if k in batch}


def sum_values(
    values: dict[str, mx.array], batch: dict[str, mx.array]
) -> dict[str, mx.array]:
    """Sum a batch's metrics on the CPU, away from the step."""
    arrays = {k: v for k, v in values.items() if k not in ("skipped", "grad_norm")}
    arrays |= metric_columns(batch)
    mx.eval(arrays)
    with mx.stream(mx.cpu):
        return preference_sums(**arrays)


def hidden_metrics(objective: Objective, tested: bool = False) -> frozenset[str]:
    """The metrics that mean nothing for an objective."""
    names: set[str] = set()
    if not objective.needs_reference and not tested:
        names.update(OF_REFERENCE)
    if objective.data == "labels":
        names.update(OF_TWO_ANSWERS)
    return frozenset(names)


def mean_metrics(
    sums: dict[str, mx.array],
    prefix: str = "",
    hidden: frozenset[str] = frozenset(),
) -> dict[str, mx.array]:
    """Average summed metrics: per pair, KL per token, perplexity of the chosen."""
    means: dict[str, mx.array] = {}
    for names, what in (
        (("loss", *PER_PAIR), "pairs"),
        (PER_CHOSEN, "chosen"),
        (PER_REJECTED, "rejected"),
        (("kl", "kl_estimate"), "tokens/completion"),
    ):
        count = mx.maximum(sums[what], 1.0)
        means |= {name: sums[name] / count for name in names if name in sums}
    means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    tokens = mx.maximum(sums["tokens/chosen"], 1.0)
    for who in ("policy", "reference"):
        means[f"perplexity/{who}"] = mx.exp(sums[f"nll/{who}"] / tokens)
    return {f"{prefix}{k}": v for k, v in means.items() if k not in hidden}


def all_sum_metrics(
    sums: dict[str, mx.array], group: mx.distributed.Group | None = None
) -> dict[str, mx.array]:
    """Add summed metrics over all ranks, in one message."""
    names = sorted(sums)
    vector = mx.stack([mx.array(sums[k], dtype=mx.float32) for k in names])
    # No stream is given: NCCL can't take the CPU's.
    return dict(zip(names, mx.distributed.all_sum(vector, group=group)))


def add_metrics(
    totals: dict[str, mx.array] | None, sums: dict[str, mx.array]
) -> dict[str, mx.array]:
    """Add a batch's sums to those of earlier batches."""
    return sums if totals is None else {k: totals[k] + sums[k] for k in sums}


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


BEST = {"accuracy": ("rewards/accuracies", 1), "loss": ("loss", -1)}
