# Copyright © 2026 MLX Contributors

"""What a preference run reports, as sums that can be added and then averaged."""

import mlx.core as mx

from ..objective.objective import Objective

# By what --save-best may choose: the metric, and whether more or less is better.
BEST = {"accuracy": ("rewards/accuracies", 1), "loss": ("loss", -1)}
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
