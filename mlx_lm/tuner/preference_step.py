# Copyright © 2026 MLX Contributors

"""One preference step: both forwards, the loss, its gradient and the update."""

from dataclasses import replace
from typing import Any, Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from .frozen_layers import FrozenLayers
from .logps import sequence_logps, weighted_sequence_logps
from .master_weights import MasterWeights
from .objective import Objective, pair_logps, pair_losses, pair_rewards
from .pair_logps import kl_baseline
from .preference_metrics import (
    hidden_metrics,
    mean_metrics,
    metric_columns,
    preference_sums,
)
from .ranks import average_over_ranks, gather_pairs, on_all_ranks
from .reference import FrozenStart, running


def reference_pass(
    policy_model: Any,
    reference_model: Callable[[mx.array], mx.array] | None,
    batch: dict[str, mx.array],
    objective: Objective | None = None,
) -> tuple[mx.array, FrozenLayers]:
    """
    The reference's log-probs, and what the policy need not compute again.

    Args:
        policy_model (nn.Module): The policy.
        reference_model (Callable, optional): A ``FrozenStart`` or another model.
            None: the batch brings ``reference_logps``.
        batch (dict): What ``collate_pairs`` made of ``B`` pairs.
        objective (Objective, optional): For ``ld_alpha``, and whether the reference
            is read at all.

    Returns:
        tuple: Summed log-probs in nats, shape ``(2B,)``, zeros where nothing reads
        them; and the outputs of the layers that policy and reference have in common.

    Raises:
        ValueError: If a reference is read, and there are neither one nor known
            log-probs.

    Example:
        >>> batch = {"reference_logps": mx.array([-1.0, -2.0])}
        >>> reference_pass(None, None, batch)[0].tolist()
        [-1.0, -2.0]
    """
    objective = objective or Objective()
    if not objective.needs_reference:
        return mx.zeros((2 * batch["weights"].size,)), FrozenLayers(None)
    if reference_model is None:
        if "reference_logps" not in batch:
            raise ValueError(
                "Without a reference_model the batch needs 'reference_logps', the "
                "reference's summed log-probs of its 2B rows."
            )
        return batch["reference_logps"], FrozenLayers(None)
    # Outside value_and_grad: inside, attention takes its slower training path.
    own = isinstance(reference_model, FrozenStart)
    frozen = FrozenLayers(policy_model if own else None)
    with running(reference_model) as model, frozen.recording():
        logps = sequence_logps(model, batch, ld_alpha=objective.ld_alpha)
        return mx.stop_gradient(logps), frozen


def answer_logps(
    model: Any, batch: dict[str, mx.array], objective: Objective, gradient: bool = False
) -> tuple[mx.array, mx.array | None]:
    """
    What the policy says of every answer, as an objective reads it.

    Args:
        model (Callable): The policy.
        batch (dict): What ``collate_pairs`` made of ``B`` pairs.
        objective (Objective): For ``ld_alpha`` and ``use_weighting``.
        gradient (bool): Whether the result will be differentiated. Default:
            ``False``.

    Returns:
        tuple: Summed log-probs in nats, shape ``(2B,)``, and the confidences that
        ``use_weighting`` asks for, or None.

    Example:
        >>> from mlx_lm.tuner.preference_batches import collate_pairs
        >>> uniform = lambda tokens: mx.zeros((*tokens.shape, 4))
        >>> batch = collate_pairs([([1], [2], [3], (1, 2, 2))])
        >>> answer_logps(uniform, batch, Objective())[0].tolist()
        [-1.3862943649291992, -1.3862943649291992]
    """
    options: dict[str, Any] = {"gradient": gradient, "ld_alpha": objective.ld_alpha}
    if objective.use_weighting:
        return weighted_sequence_logps(model, batch, **options)
    return sequence_logps(model, batch, **options), None


def loss_and_values(
    policy_logps: mx.array,
    reference_logps: mx.array,
    batch: dict[str, mx.array],
    objective: Objective,
    confidences: mx.array | None = None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """
    The loss summed over a batch's pairs, and what metrics are made of.

    Args:
        policy_logps (mx.array): Summed log-probs in nats. Shape: ``(2B,)``.
        reference_logps (mx.array): The same under the reference.
        batch (dict): What ``collate_pairs`` made, with the data's own columns.
        objective (Objective): The losses.
        confidences (mx.array, optional): How likely the policy would write each
            answer, see ``use_weighting``. Shape: ``(2B,)``.

    Returns:
        tuple: a float32 scalar, and arguments of ``preference_sums`` by name.

    Example:
        >>> batch = {"weights": mx.ones((1,))}
        >>> logps = mx.array([-1.0, -2.0])
        >>> round(loss_and_values(logps, logps, batch, Objective())[0].item(), 6)
        0.693147
    """
    pairs = pair_logps(policy_logps, reference_logps, batch, objective)
    chosen_rewards, rejected_rewards = pair_rewards(pairs, objective)
    values = {
        "chosen_rewards": chosen_rewards,
        "rejected_rewards": rejected_rewards,
        "policy_logps": policy_logps,
        "reference_logps": reference_logps,
    }
    if objective.couples:
        loss, values["losses"] = _coupled_loss(pairs, objective, values)
        return loss, values
    if confidences is not None:
        chosen, rejected = mx.split(confidences, 2)
        confidences = chosen * rejected
    values["losses"] = pair_losses(pairs, objective, confidences)
    return (values["losses"] * batch["weights"]).sum(), values


def _coupled_loss(pairs, objective, values):
    """The loss of pairs that depend on those of all ranks."""
    arrays = {k: v for k, v in vars(pairs).items() if isinstance(v, mx.array)}
    gathered, own = gather_pairs(arrays)
    everyone = replace(pairs, **gathered)
    losses = pair_losses(everyone, objective)
    if objective.data == "labels":
        values["baseline"] = objective.beta * kl_baseline(everyone)
    mine = (losses[own] * pairs.weights).sum()
    # This rank's pairs also change the losses of others: a gradient, no value.
    others = (losses * everyone.weights).sum() - mine
    return mine + others - mx.stop_gradient(others), losses[own]


def _all_finite(tree):
    sums = [mx.isfinite(x).all() for _, x in tree_flatten(tree)]
    return mx.stack(sums).all()


def _put(tree, other):
    """Put other arrays into a tree, in place: compiled steps hold on to it."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        if isinstance(tree[key], (dict, list)):
            _put(tree[key], other[key])
        else:
            tree[key] = other[key]


def _update(policy_model, optimizer, gradients, pairs, max_grad_norm):
    """Average the summed float32 gradients over all ranks' pairs, clip, apply.

    A gradient that is not finite, on any rank, changes nothing.
    """
    gradients, pairs = average_over_ranks([gradients, pairs])
    # On average over ranks, and of uncertain labels, there may be less than one.
    scale = 1 / mx.where(pairs > 0, pairs, 1)
    gradients = tree_map(lambda g: g * scale, gradients)
    gradients, norm = optim.clip_grad_norm(gradients, max_grad_norm or float("inf"))
    applies = mx.logical_and(mx.isfinite(norm), pairs > 0)
    parameters = policy_model.trainable_parameters()
    if not isinstance(optimizer, MasterWeights):
        gradients = tree_map(lambda g, p: g.astype(p.dtype), gradients, parameters)
        optimizer.init(parameters)
    before = tree_map(lambda x: x, optimizer.state)
    optimizer.update(policy_model, gradients)
    choose = lambda new, old: mx.where(applies, new, old)
    updated = policy_model.trainable_parameters()
    policy_model.update(tree_map(choose, updated, parameters))
    _put(optimizer.state, tree_map(choose, optimizer.state, before))
    return norm, applies, gradients


def dpo_step(
    policy_model: nn.Module,
    reference_model: Callable[[mx.array], mx.array] | None,
    batch: dict[str, mx.array],
    optimizer: Any,
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    objective: Objective | None = None,
    max_grad_norm: float | None = None,
    accumulator: dict | None = None,
    do_update: bool = True,
    reduce: bool = True,
    keep_gradients: bool = False,
) -> tuple[mx.array, dict[str, mx.array]]:
    """
    One training step: both forwards, the loss, its gradient and the update.

    Paper: https://arxiv.org/abs/2305.18290, Eq. 7.

    Args:
        policy_model (nn.Module): The model in training; its trainable
            parameters are updated in place.
        reference_model (Callable, optional): A ``FrozenStart``, or another model
            in evaluation mode. ``None`` takes the log-probs that are known from
            ``batch["reference_logps"]``, in nats, shape ``(2B,)``. An objective
            without a reference runs none.
        batch (dict): What ``collate_pairs`` makes of ``B`` pairs.
        optimizer (optim.Optimizer): The optimizer, or a ``MasterWeights``.
        beta (float): Inverse temperature. Default: ``0.1``.
        label_smoothing (float): Probability that a label is wrong. Default: ``0``.
        loss_type (str): A key of ``losses.LOSSES``. Default: ``"sigmoid"``.
        objective (Objective, optional): All of what is minimised, instead of beta,
            smoothing and type.
        max_grad_norm (float, optional): Clip the gradient to this norm.
        accumulator (dict, optional): Holds the gradient of earlier batches, see
            ``gradient_accumulator``. The update uses the mean over all pairs
            since the last one, as one big batch would.
        do_update (bool): ``False`` only adds to the accumulator.
        reduce (bool): Average the metrics. ``False`` returns arguments of
            ``preference_sums`` instead, whose sums may be added over batches and
            given to ``mean_metrics``. Default: ``True``.
        keep_gradients (bool): Return the gradient that was applied, a tree, as
            ``gradients``. Default: ``False``.

    Returns:
        tuple: the mean loss over the batch's pairs in nats, a float32 scalar,
        and a dict of metrics (scalars), with ``grad_norm`` after an update and
        ``skipped``: 1 if a loss or gradient was not finite, so that the batch
        changed nothing.

    Raises:
        ValueError: If an option is out of range, or there is neither a reference
            model nor known log-probs.

    Example:
        >>> from mlx_lm.tuner.preference_batches import collate_pairs
        >>> from mlx_lm.tuner.reference import FrozenStart
        >>> class Bigram(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = mx.zeros((8, 8))
        ...     def __call__(self, tokens):
        ...         return self.table[tokens]
        >>> policy = Bigram()
        >>> reference = FrozenStart(policy)
        >>> batch = collate_pairs([([1], [2], [3], (1, 2, 2))])
        >>> for _ in range(2):
        ...     loss, metrics = dpo_step(policy, reference, batch, optim.SGD(1.0))
        >>> loss.item() < 0.6931, metrics["rewards/accuracies"].item()
        (True, 1.0)
    """
    objective = objective or Objective(beta, loss_type, label_smoothing=label_smoothing)
    reference_logps, frozen = reference_pass(
        policy_model, reference_model, batch, objective
    )
    parameters = policy_model.trainable_parameters()

    def loss_fn(batch):
        with frozen.replaying():
            logps = answer_logps(policy_model, batch, objective, gradient=True)
        policy_logps, confidences = logps
        return loss_and_values(
            policy_logps, reference_logps, batch, objective, confidences
        )

    (loss, values), gradients = nn.value_and_grad(policy_model, loss_fn)(batch)
    # Differentiation leaves its tracers in the model.
    policy_model.update(parameters)
    gradients = tree_map(lambda g: g.astype(mx.float32), gradients)

    batch_pairs = pairs = (batch["weights"] > 0).sum().astype(mx.float32)
    # An infinite log-prob may leave the loss finite.
    applies = _all_finite([loss, values])
    if accumulator is not None:
        # Of several batches, only what is finite counts: on no rank if on one not.
        applies = on_all_ranks(mx.logical_and(applies, _all_finite(gradients)))
        gradients, pairs = _accumulate(
            accumulator, gradients, pairs, applies, do_update
        )
    else:
        # No number of pairs: the update sees it on every rank.
        pairs = mx.where(applies, pairs, mx.nan)
    metrics = values
    if reduce:
        sums = preference_sums(**values, **metric_columns(batch))
        metrics = mean_metrics(sums, hidden=hidden_metrics(objective))
    if do_update:
        metrics["grad_norm"], updated, gradients = _update(
            policy_model, optimizer, gradients, pairs, max_grad_norm
        )
        if keep_gradients:
            metrics["gradients"] = gradients
        applies = mx.logical_and(applies, updated)
    metrics["skipped"] = 1 - applies.astype(mx.float32)
    return loss / mx.where(batch_pairs > 0, batch_pairs, 1), metrics


def _accumulate(accumulator, gradients, pairs, applies, do_update):
    """Add a batch to those before it; an update empties what is kept."""
    add = lambda total, g: total + mx.where(applies, g, 0)
    gradients = tree_map(add, accumulator["gradients"], gradients)
    pairs = add(accumulator["pairs"], pairs)
    keep = mx.zeros_like if do_update else lambda x: x
    accumulator["gradients"] = tree_map(keep, gradients)
    accumulator["pairs"] = keep(pairs)
    return gradients, pairs


def gradient_accumulator(model: nn.Module) -> dict:
    """
    An empty accumulator for ``dpo_step``, in float32.

    Args:
        model (nn.Module): The policy.

    Returns:
        dict: The summed gradient and the number of pairs in it.

    Example:
        >>> gradient_accumulator(nn.Linear(1, 1))["pairs"].item()
        0.0
    """
    zeros = tree_map(
        lambda p: mx.zeros(p.shape, dtype=mx.float32), model.trainable_parameters()
    )
    return {"gradients": zeros, "pairs": mx.array(0.0)}
