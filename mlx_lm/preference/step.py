# Copyright © 2026 MLX Contributors

"""One preference step: both forwards, the loss, its gradient and the update."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .errors import InputError
from .forward import answers
from .forward.frozen import Apart, common_layers, running
from .objective.objective import Objective, pair_losses, pair_rewards
from .objective.pairs import PairLogps, pair_logps
from .plug_ins import load

# The loss of pairs that depend on others, and its values, if there are such losses.
COUPLED: list[Callable[[PairLogps, Objective, dict], tuple[mx.array, mx.array]]] = []


def reference_pass(
    policy_model: Any,
    reference_model: Callable[[mx.array], mx.array] | None,
    batch: dict[str, mx.array],
    objective: Objective | None = None,
) -> tuple[mx.array, Any]:
    """The reference's log-probs, and what the policy need not compute again."""
    objective = objective or Objective()
    if not objective.needs_reference:
        return mx.zeros((2 * batch["weights"].size,)), Apart()
    if reference_model is None:
        if "reference_logps" not in batch:
            raise InputError(
                "Without a reference_model the batch needs 'reference_logps', the "
                "reference's summed log-probs of its 2B rows."
            )
        return batch["reference_logps"], Apart()
    # Outside value_and_grad: inside, attention takes its slower training path.
    common = common_layers(policy_model, reference_model)
    with running(reference_model) as model, common.recording():
        logps = answers.sequence_logps(model, batch, ld_alpha=objective.ld_alpha)
        return mx.stop_gradient(logps), common


def answer_logps(
    model: Any, batch: dict[str, mx.array], objective: Objective, gradient: bool = False
) -> tuple[mx.array, mx.array | None]:
    """What the policy says of every answer, as an objective reads it."""
    options: dict[str, Any] = {"gradient": gradient, "ld_alpha": objective.ld_alpha}
    if objective.use_weighting:
        return answers.weighted_sequence_logps(model, batch, **options)
    return answers.sequence_logps(model, batch, **options), None


def loss_and_values(
    policy_logps: mx.array,
    reference_logps: mx.array,
    batch: dict[str, mx.array],
    objective: Objective,
    confidences: mx.array | None = None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """The loss summed over a batch's pairs, and what metrics are made of."""
    pairs = pair_logps(policy_logps, reference_logps, batch, objective)
    chosen_rewards, rejected_rewards = pair_rewards(pairs, objective)
    values = {
        "chosen_rewards": chosen_rewards,
        "rejected_rewards": rejected_rewards,
        "policy_logps": policy_logps,
        "reference_logps": reference_logps,
    }
    if objective.couples:
        loss, values["losses"] = COUPLED[-1](pairs, objective, values)
        return loss, values
    if confidences is not None:
        chosen, rejected = mx.split(confidences, 2)
        confidences = chosen * rejected
    values["losses"] = pair_losses(pairs, objective, confidences)
    return (values["losses"] * batch["weights"]).sum(), values


def scoring_step(
    policy_model: nn.Module, objective: Objective, start: bool = False
) -> Callable:
    """What validation asks of a batch: the same numbers without a gradient."""
    # The policy as it started is the reference: one forward tells both.
    start = start and not objective.use_weighting

    def score(reference_model, batch):
        reference_logps, common = reference_pass(
            policy_model, reference_model, batch, objective
        )
        logps, confidences = reference_logps, None
        if not start:
            with common.replaying():
                logps, confidences = answer_logps(policy_model, batch, objective)
        return loss_and_values(logps, reference_logps, batch, objective, confidences)[1]

    return score


def testing_step(
    policy_model: nn.Module, reference_model: Callable, objective: Objective
) -> Callable:
    """What a test asks of a batch: whole answers' log-probs, and the exact KL."""

    def score(batch):
        paired = partial(
            answers.paired_sequence_logps, policy_model, reference_model, batch
        )
        *plain, kl = paired()
        logps = plain
        if objective.ld_alpha < 1:
            # Loss and rewards alone are of weighted sums.
            *logps, _ = paired(ld_alpha=objective.ld_alpha)
        confidences = None
        if objective.use_weighting:
            _, confidences = answer_logps(policy_model, batch, objective)
        _, values = loss_and_values(*logps, batch, objective, confidences)
        names = ("policy_logps", "reference_logps")
        return values | dict(zip(names, plain)) | {"kl": kl}

    return score


# It adds to the list.
PLUG_INS = ("coupled",)
load(__package__ or "", PLUG_INS)
