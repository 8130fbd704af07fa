# Copyright © 2026 MLX Contributors

"""What a preference run reports, as sums that can be added and then averaged."""

import mlx.core as mx

from ..objective.objective import Objective
from ..objective.pairs import examples

# The sum that each metric's own is divided by; what is made of others has none.
OVER = {
    "loss": "examples",
    "rewards/accuracies": "pairs",
    "logps/accuracies": "pairs",
    "logps/accuracies_per_token": "pairs",
    "reference_logps/accuracies": "pairs",
    "reference_logps/accuracies_per_token": "pairs",
    "rewards/chosen": "chosen",
    "logps/chosen": "chosen",
    "rewards/rejected": "rejected",
    "logps/rejected": "rejected",
    "kl": "tokens/completion",
    "kl_estimate": "tokens/completion",
}
# Of a training step: the exact KL is a test's.
SUMS = (
    *(name for name in OVER if name != "kl"),
    *("nll/policy", "nll/reference", "tokens/chosen", "tokens/completion"),
    *("tokens/all", "pairs", "examples", "chosen", "rejected"),
)
# Some losses have no reference, and some rows one answer.
_OF_TWO = frozenset(name for name in OVER if "logps/accuracies" in name)
_OF_REFERENCE = frozenset(name for name in _OF_TWO if name.startswith("reference"))
_OF_REFERENCE |= {"perplexity/reference", "kl_estimate"}


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
    has_reference = objective.needs_reference or tested
    hidden = frozenset() if has_reference else _OF_REFERENCE
    return hidden | _OF_TWO if objective.data == "labels" else hidden


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
    for name, over in OVER.items():
        if name in sums:
            means[name] = sums[name] / _count(sums, over)
    means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    tokens = _count(sums, "tokens/chosen")
    for who in ("policy", "reference"):
        means[f"perplexity/{who}"] = mx.exp(sums[f"nll/{who}"] / tokens)
    return {name: x for name, x in means.items() if name not in hidden}
