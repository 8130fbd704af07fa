# Copyright © 2026 MLX Contributors

"""What a preference run reports, as sums that can be added and then averaged."""

import mlx.core as mx

from .objective import Objective

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
    """
    Sum a batch's metrics over its pairs.

    Of labelled answers those that are desirable count as chosen, the others as
    rejected, and one is right whose reward is on its label's side of the baseline.

    Args:
        losses (mx.array): Per-pair losses in nats. Shape: ``(B,)``.
        chosen_rewards (mx.array): In nats. Shape: ``(B,)``.
        rejected_rewards (mx.array): In nats. Shape: ``(B,)``.
        policy_logps (mx.array): Summed log-probs in nats, chosen rows first.
            Shape: ``(2B,)``.
        reference_logps (mx.array): The same under the reference.
        lengths (mx.array): Prompt length and whole length of each row, in
            tokens. Shape: ``(2B, 2)``.
        weights (mx.array): What a pair's loss counts, 0 for filling. Shape:
            ``(B,)``.
        kl (mx.array, optional): Exact KL of each row's completion in nats,
            shape ``(2B,)``; estimated from the log-ratios if not given.
        labels (mx.array, optional): 1 for a desirable answer, 0 for another; then
            only the first ``B`` rows are answers of the data. Shape: ``(B,)``.
        baseline (mx.array, optional): The reward of a batch's labelled answers to
            compare with, in nats.

    Returns:
        dict: float32 scalars; ``mean_metrics`` turns them into averages.

    Example:
        >>> one, two = mx.ones((1,)), mx.array([-1.0, -2.0])
        >>> lengths = mx.array([[1, 2], [1, 3]])
        >>> sums = preference_sums(one, one, 0 * one, two, two, lengths, one)
        >>> sums["rewards/accuracies"].item(), sums["tokens/completion"].item()
        (1.0, 3.0)
    """
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
    """
    What ``preference_sums`` takes of a batch itself.

    Args:
        batch (dict): What ``collate_pairs`` made, with the data's own columns.

    Returns:
        dict: Lengths, weights, and labels where there are any.

    Example:
        >>> list(metric_columns({"inputs": 0, "weights": 1, "lengths": 2}))
        ['lengths', 'weights']
    """
    return {k: batch[k] for k in ("lengths", "weights", "labels") if k in batch}


def sum_values(
    values: dict[str, mx.array], batch: dict[str, mx.array]
) -> dict[str, mx.array]:
    """
    Sum a batch's metrics on the CPU, away from the step.

    They are many small operations, and a GPU would build a kernel for each.

    Args:
        values (dict): What ``dpo_step`` returns beside the loss, not reduced.
        batch (dict): For ``lengths`` and ``weights``.

    Returns:
        dict: What ``preference_sums`` returns.

    Example:
        >>> one, two = mx.ones((1,)), mx.array([-1.0, -2.0])
        >>> values = dict.fromkeys(("losses", "chosen_rewards"), one)
        >>> values |= {"rejected_rewards": one, "policy_logps": two}
        >>> batch = {"lengths": mx.array([[1, 2], [1, 3]]), "weights": one}
        >>> sum_values(values | {"reference_logps": two}, batch)["loss"].item()
        1.0
    """
    arrays = {k: v for k, v in values.items() if k not in ("skipped", "grad_norm")}
    arrays |= metric_columns(batch)
    mx.eval(arrays)
    with mx.stream(mx.cpu):
        return preference_sums(**arrays)


def hidden_metrics(objective: Objective, tested: bool = False) -> frozenset[str]:
    """
    The metrics that mean nothing for an objective.

    Args:
        objective (Objective): What is minimised.
        tested (bool): Of a test, which runs a reference for every objective.
            Default: ``False``.

    Returns:
        frozenset: Names of ``mean_metrics``.

    Example:
        >>> sorted(hidden_metrics(Objective(loss_type="simpo")))[:2]
        ['kl_estimate', 'perplexity/reference']
    """
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
    """
    Average summed metrics: per pair, KL per token, perplexity of the chosen.

    Args:
        sums (dict): What ``preference_sums`` returned, added over batches and
            ranks.
        prefix (str): Put before every name, for example ``"val_"``.
        hidden (frozenset): What ``hidden_metrics`` returned. Default: nothing.

    Returns:
        dict: float32 scalars by name. Losses, rewards and log-probs in nats.

    Example:
        >>> sums = dict.fromkeys(SUMS, mx.array(3.0)) | {"pairs": 2}
        >>> sums |= {"nll/policy": 0.0, "kl": 1.5}
        >>> metrics = mean_metrics(sums, "val_")
        >>> [metrics[f"val_{k}"].item() for k in ("loss", "kl", "perplexity/policy")]
        [1.5, 0.5, 1.0]
    """
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
    """
    Add summed metrics over all ranks, in one message.

    Args:
        sums (dict): What ``preference_sums`` returned, added over batches.
        group (mx.distributed.Group, optional): The ranks. Default: all.

    Returns:
        dict: The sums over all ranks.

    Example:
        >>> all_sum_metrics({"pairs": mx.array(2.0)})["pairs"].item()
        2.0
    """
    names = sorted(sums)
    vector = mx.stack([mx.array(sums[k], dtype=mx.float32) for k in names])
    # No stream is given: NCCL can't take the CPU's.
    return dict(zip(names, mx.distributed.all_sum(vector, group=group)))


def add_metrics(
    totals: dict[str, mx.array] | None, sums: dict[str, mx.array]
) -> dict[str, mx.array]:
    """
    Add a batch's sums to those of earlier batches.

    Args:
        totals (dict, optional): The sums so far, None at the start.
        sums (dict): What ``preference_sums`` returned.

    Returns:
        dict: The new sums, not evaluated yet.

    Example:
        >>> add_metrics({"pairs": mx.array(2.0)}, {"pairs": mx.array(1.0)})["pairs"]
        array(3, dtype=float32)
    """
    return sums if totals is None else {k: totals[k] + sums[k] for k in sums}
