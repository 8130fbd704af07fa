# Copyright © 2026 MLX Contributors

"""What a preference run reports, as sums that can be added and then averaged."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx

from ..objective.objective import Objective
from ..objective.pairs import examples

# By what --save-best may choose: the metric, and whether more or less is better.
BEST = {"accuracy": ("rewards/accuracies", 1), "loss": ("loss", -1)}


class Metric(NamedTuple):
    """What a metric is called, averaged over, and how a test and a report show it."""

    # Several names, with spaces between them, share a row.
    name: str
    # The sum that its own is divided by; what is made of others has none.
    over: str = ""
    # The row of a test's table, its form, the start's metric, and how many it is of.
    row: str = ""
    form: str = "{:.3f}"
    start: str = ""
    total: str = ""
    # Title and unit of a report's chart; chosen and rejected answers share one.
    chart: tuple[str, str] = ("", "")
    # Whether it is said of the reference, of a pair's two answers: some have none.
    of_reference: bool = False
    of_two: bool = False


RATE = "{:.1%}"
LIKELIER, PER_TOKEN = "logps/accuracies", "logps/accuracies_per_token"
LENGTH_GROUPS = {
    "chosen_shorter": "chosen is shorter",
    "equal_length": "about as long",
    "chosen_longer": "chosen is longer",
}
_REWARDS: dict[str, Any] = {"chart": ("Rewards", "nats")}
_LOGPS: dict[str, Any] = {"chart": ("Log-probs of the answers", "nats")}
_RIGHT: dict[str, Any] = {"chart": ("Reward accuracy", "%")}
_MARGIN: dict[str, Any] = {"chart": ("Reward margin", "nats")}
_KL: dict[str, Any] = {
    "chart": ("KL from the reference, estimated", "nats"),
    "of_reference": True,
}
_BOTH: dict[str, Any] = {"of_two": True, "of_reference": True}
_ENDS = "rewards/accuracies_low rewards/accuracies_high"
_CHOSEN, _TEXT = "perplexity of chosen", "perplexity of ordinary text"


def _rate(name: str, row: str) -> Metric:
    return Metric(name, "pairs", row, RATE, f"reference_{name}", of_two=True)


def _by_length(name: str, start: str = "") -> Iterator[Metric]:
    for group, label in LENGTH_GROUPS.items():
        row, start_name = f"  {label} (n = {{}})", start and f"{start}/{group}"
        yield Metric(f"{name}/{group}", "", row, RATE, start_name, f"pairs/{group}")


def _calibration(name: str, row: str) -> Metric:
    return Metric(name, row=row, start=f"reference_{name}")


# In the order of the table's rows and of the charts.
METRICS = (
    Metric("loss", "examples", chart=("Loss", "nats")),
    Metric("rewards/accuracies", "pairs", "reward accuracy", RATE, **_RIGHT),
    Metric(_ENDS, row="  95 % interval", form="{:.1%}-{:.1%}"),
    *_by_length("rewards/accuracies"),
    Metric("rewards/margins", "", "reward margin (nats)", **_MARGIN),
    Metric("rewards/chosen", "chosen", "reward of chosen (nats)", **_REWARDS),
    Metric("rewards/rejected", "rejected", "reward of rejected (nats)", **_REWARDS),
    _rate(LIKELIER, "chosen likelier than rejected"),
    *_by_length(LIKELIER, f"reference_{LIKELIER}"),
    _rate(PER_TOKEN, "chosen likelier, per token"),
    Metric(f"reference_{LIKELIER}", "pairs", **_BOTH),
    Metric(f"reference_{PER_TOKEN}", "pairs", **_BOTH),
    Metric("logps/chosen", "chosen", **_LOGPS),
    Metric("logps/rejected", "rejected", **_LOGPS),
    Metric("perplexity/policy", "", _CHOSEN, "{:.2f}", "perplexity/reference"),
    Metric("perplexity/reference", of_reference=True),
    Metric("retained_text/after", "", _TEXT, "{:.2f}", "retained_text/before"),
    Metric("kl", "tokens/completion", "KL from it, per token (nats)", "{:.4f}"),
    Metric("kl_per_answer/chosen", row="  per chosen answer (nats)"),
    Metric("kl_per_answer/rejected", row="  per rejected answer (nats)"),
    Metric("kl_estimate", "tokens/completion", **_KL),
    _calibration("calibration/ece", "calibration error (ECE)"),
    _calibration("calibration/brier", "Brier score"),
    Metric("grad_norm", chart=("Gradient norm", "")),
    Metric("learning_rate", chart=("Learning rate", "")),
    Metric("tokens_per_second", chart=("Speed", "tokens/s")),
    Metric("peak_memory", chart=("Peak memory", "GB")),
)
# Of a training step: the exact KL is a test's.
SUMS = (
    *(m.name for m in METRICS if m.over and m.name != "kl"),
    *("nll/policy", "nll/reference", "tokens/chosen", "tokens/completion"),
    *("tokens/all", "pairs", "examples", "chosen", "rejected"),
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
    places: mx.array | None = None,
    counts: mx.array | None = None,
) -> dict[str, mx.array]:
    """Sum a batch's metrics over its pairs."""
    real = (weights > 0).astype(mx.float32)
    if counts is None:
        counts = lengths[:, 1] - mx.maximum(lengths[:, 0], 1)
    counts = counts.astype(mx.float32)
    sums = {"loss": (losses * weights).sum()}
    # How often the chosen answer is the likelier one, summed and per token.
    for name, logps in (("logps", policy_logps), ("reference_logps", reference_logps)):
        per_token = logps / mx.maximum(counts, 1)
        for suffix, x in (("", logps), ("_per_token", per_token)):
            chosen, rejected = mx.split(x, 2)
            sums[f"{name}/accuracies{suffix}"] = ((chosen > rejected) * real).sum()
    chosen, rejected = mx.split(policy_logps, 2)
    if labels is None:
        is_chosen, is_rejected = real, real
        right = chosen_rewards > rejected_rewards
        rows = mx.concatenate([real, real])
    else:
        is_chosen, is_rejected = real * labels, real * (1 - labels)
        rejected, rejected_rewards = chosen, chosen_rewards
        above = chosen_rewards - (0.0 if baseline is None else baseline)
        # At the start all are at it: none is right, as among pairs.
        right = mx.where(labels > 0, above, -above) > 0
        # The second half of the rows is there for the baseline alone.
        rows = mx.concatenate([real, mx.zeros_like(real)])
    sums["rewards/accuracies"] = (right * real).sum()
    sums["rewards/chosen"] = (chosen_rewards * is_chosen).sum()
    sums["rewards/rejected"] = (rejected_rewards * is_rejected).sum()
    sums["logps/chosen"] = (chosen * is_chosen).sum()
    sums["logps/rejected"] = (rejected * is_rejected).sum()
    if kl is None:
        # Half the squared log-ratio: Schulman's k2, on the data's answers.
        log_ratio = policy_logps - reference_logps
        sums["kl_estimate"] = (0.5 * log_ratio**2 * rows).sum()
    else:
        sums["kl"] = (kl * rows).sum()
    likely = mx.concatenate([is_chosen, mx.zeros_like(is_chosen)])
    sums["nll/policy"] = -(policy_logps * likely).sum()
    sums["nll/reference"] = -(reference_logps * likely).sum()
    sums["tokens/chosen"] = (counts * likely).sum()
    sums["tokens/completion"] = (counts * rows).sum()
    sums["tokens/all"] = (lengths[:, 1] * rows).sum()
    totals = {"pairs": real, "chosen": is_chosen, "rejected": is_rejected}
    totals["examples"] = examples(weights, places)
    return sums | {k: v.sum() for k, v in totals.items()}


def metric_columns(batch: dict[str, mx.array]) -> dict[str, mx.array]:
    """What ``preference_sums`` takes of a batch itself."""
    names = ("lengths", "weights", "labels", "places", "counts")
    return {k: batch[k] for k in names if k in batch}


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
    no_reference = not objective.needs_reference and not tested
    return frozenset(
        metric.name
        for metric in METRICS
        if (metric.of_reference and no_reference)
        or (metric.of_two and objective.data == "labels")
    )


def _count(sums, over):
    """What a sum is divided by: of no answers, there is no average."""
    name = over.rpartition("/")[2]
    answers = sums[name if name in ("chosen", "rejected") else "pairs"]
    return mx.where(answers > 0, mx.maximum(sums[over], 1.0), mx.nan)


def mean_metrics(
    sums: dict[str, mx.array], hidden: frozenset[str] = frozenset()
) -> dict[str, mx.array]:
    """Average summed metrics: per pair, KL per token, perplexity of the chosen."""
    means: dict[str, mx.array] = {}
    for over in dict.fromkeys(metric.over for metric in METRICS if metric.over):
        count = _count(sums, over)
        own = [m.name for m in METRICS if m.over == over and m.name in sums]
        means |= {name: sums[name] / count for name in own}
    means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    tokens = _count(sums, "tokens/chosen")
    for who in ("policy", "reference"):
        means[f"perplexity/{who}"] = mx.exp(sums[f"nll/{who}"] / tokens)
    return {name: x for name, x in means.items() if name not in hidden}
