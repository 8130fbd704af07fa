# Copyright © 2026 MLX Contributors

"""The steps of a run: what the loop calls on every batch, ready to be compiled."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .master_weights import MasterWeights
from .preference_step import (
    answer_logps,
    dpo_step,
    gradient_accumulator,
    loss_and_values,
    reference_pass,
)


def training_step(
    policy_model: nn.Module, optimizer: Any, args: Any
) -> tuple[Callable, list]:
    """
    ``dpo_step`` with a run's settings, and the state that it changes.

    Args:
        policy_model (nn.Module): The policy.
        optimizer (optim.Optimizer): The optimizer, or a ``MasterWeights``.
        args (DPOTrainingArgs): The settings of the run.

    Returns:
        tuple: A function of the reference (or None), a batch and whether to
        update, see ``RememberedReference.compiled``; and the state.

    Example:
        >>> from mlx_lm.tuner.trainer import DPOTrainingArgs
        >>> import mlx.optimizers as optim
        >>> args = DPOTrainingArgs()
        >>> step, state = training_step(nn.Linear(1, 1), optim.SGD(1.0), args)
        >>> len(state)
        4
    """
    accumulator = None
    if args.grad_accumulation_steps > 1:
        accumulator = gradient_accumulator(policy_model)
    if not isinstance(optimizer, MasterWeights):
        # A state that grows during the first step would compile it twice.
        optimizer.init(policy_model.trainable_parameters())
    state = [
        policy_model.state,
        optimizer.state,
        mx.random.state,
        accumulator or {},
    ]

    def step(reference_model, batch, do_update):
        return dpo_step(
            policy_model,
            reference_model,
            batch,
            optimizer,
            objective=args.objective,
            max_grad_norm=args.max_grad_norm,
            accumulator=accumulator,
            do_update=do_update,
            reduce=False,
            keep_gradients=args.debug_gradients,
        )[1]

    return step, state


def scoring_step(policy_model: nn.Module, args: Any) -> Callable:
    """
    What validation asks of a batch: the same numbers without a gradient.

    Args:
        policy_model (nn.Module): The policy.
        args (DPOTrainingArgs): The settings of the run.

    Returns:
        Callable: A function of the reference (or None) and a batch; it returns
        arguments of ``preference_sums``.

    Example:
        >>> from mlx_lm.tuner.trainer import DPOTrainingArgs
        >>> callable(scoring_step(nn.Linear(1, 1), DPOTrainingArgs()))
        True
    """

    objective = args.objective

    def score(reference_model, batch):
        reference_logps, frozen = reference_pass(
            policy_model, reference_model, batch, objective
        )
        with frozen.replaying():
            logps, confidences = answer_logps(policy_model, batch, objective)
        return loss_and_values(logps, reference_logps, batch, objective, confidences)[1]

    return score


def compiles(args: Any) -> bool:
    """
    Tell whether a run's steps are compiled.

    Args:
        args (DPOTrainingArgs): The settings of the run.

    Returns:
        bool: What ``compile`` says, else True on a GPU: a CPU gains nothing from
        it, and builds a library for every new shape.

    Example:
        >>> from mlx_lm.tuner.trainer import DPOTrainingArgs
        >>> compiles(DPOTrainingArgs(compile=True))
        True
    """
    if args.compile is not None:
        return args.compile
    return mx.default_device() == mx.gpu
