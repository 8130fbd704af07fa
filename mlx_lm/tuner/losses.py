# Copyright © 2026 MLX Contributors

"""Preference losses, on logits and on log-probabilities.

    dpo_loss(four logits, targets, masks)     what a user calls
      score_tokens(policy, reference)         log-prob of every target, exact KL
      preference_loss(four summed logps)      per-pair losses and rewards
        LOSSES[loss_type]                     the formula alone

Everything from the logits on is float32.
"""

import math
from typing import Callable

import mlx.core as mx
import mlx.nn as nn

from ._upstream_losses import (
    _js_backward_kernel,
    _js_div_loss,
    _js_forward_kernel,
    _kl_backward_kernel,
    _kl_div_loss,
    _kl_forward_kernel,
    _make_js_backward_kernel,
    _make_js_forward_kernel,
    _make_kl_backward_kernel,
    _make_kl_forward_kernel,
    can_run_metal,
    js_div_loss,
    kl_div_loss,
)
from .token_scores import score_tokens, token_logps


def sigmoid_loss(logratios: mx.array, beta: float, label_smoothing: float) -> mx.array:
    """
    The DPO loss, with label smoothing (conservative DPO) if asked for.

    ``-(1 - e) * log sigmoid(beta * h) - e * log sigmoid(-beta * h)``, where
    ``h`` is the policy's log-ratio of chosen to rejected minus the reference's.

    Paper: https://arxiv.org/abs/2305.18290, Eq. 7.

    Args:
        logratios (mx.array): ``h`` in nats. Shape: ``(B,)``.
        beta (float): Inverse temperature, how strongly the reference holds.
        label_smoothing (float): ``e``, the probability that a label is wrong.

    Returns:
        mx.array: One loss a pair, in nats. Shape: ``(B,)``.

    Example:
        >>> round(sigmoid_loss(mx.array([0.0]), 0.1, 0.0).item(), 6)
        0.693147
    """
    scores = beta * logratios
    losses = -nn.log_sigmoid(scores)
    if label_smoothing > 0:
        losses = (1 - label_smoothing) * losses
        losses = losses - label_smoothing * nn.log_sigmoid(-scores)
    return losses


LOSSES: dict[str, Callable[[mx.array, float, float], mx.array]] = {
    "sigmoid": sigmoid_loss,
}


def check_loss_options(beta: float, label_smoothing: float, loss_type: str) -> None:
    """
    Check the numbers that shape a preference loss, before any work is done.

    Args:
        beta (float): Inverse temperature, a positive finite number.
        label_smoothing (float): Probability that a label is wrong, in [0, 0.5).
        loss_type (str): A key of ``LOSSES``.

    Raises:
        ValueError: If one of them is out of range; the message has the value.

    Example:
        >>> check_loss_options(0.0, 0.0, "sigmoid")
        Traceback (most recent call last):
        ...
        ValueError: beta must be a positive number, got 0.0.
    """
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be a positive number, got {beta}.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must be at least 0 and below 0.5, got {label_smoothing}."
        )
    if loss_type not in LOSSES:
        raise ValueError(
            f"Unknown loss_type {loss_type!r}, choose from {', '.join(LOSSES)}."
        )


def preference_loss(
    policy_chosen_logps: mx.array,
    policy_rejected_logps: mx.array,
    reference_chosen_logps: mx.array,
    reference_rejected_logps: mx.array,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
) -> tuple[mx.array, mx.array, mx.array]:
    """
    Per-pair losses and rewards from summed log-probabilities.

    ``h = (policy_chosen - policy_rejected) - (reference_chosen -
    reference_rejected)`` goes into the loss; the implicit reward of an answer is
    ``beta * (policy - reference)``.

    Paper: https://arxiv.org/abs/2305.18290, Eq. 5 (rewards) and Eq. 7 (loss).

    Args:
        policy_chosen_logps (mx.array): Log-prob of each chosen answer under the
            policy, in nats. Shape: ``(B,)``.
        policy_rejected_logps (mx.array): The same for the rejected answers.
        reference_chosen_logps (mx.array): Chosen, under the reference.
        reference_rejected_logps (mx.array): Rejected, under the reference.
        beta (float): Inverse temperature. Default: ``0.1``.
        label_smoothing (float): Probability that a label is wrong. Default: ``0``.
        loss_type (str): A key of ``LOSSES``. Default: ``"sigmoid"``.

    Returns:
        tuple: losses, chosen rewards and rejected rewards, each of shape
        ``(B,)`` in nats; no gradient flows through the rewards.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> logps = [mx.array([x]) for x in (-10.0, -12.0, -11.0, -12.0)]
        >>> losses, chosen, rejected = preference_loss(*logps, beta=0.5)
        >>> [round(x.item(), 4) for x in (losses, chosen, rejected)]
        [0.4741, 0.5, 0.0]
    """
    check_loss_options(beta, label_smoothing, loss_type)
    policy_chosen_logps, policy_rejected_logps = (
        x.astype(mx.float32) for x in (policy_chosen_logps, policy_rejected_logps)
    )
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    losses = LOSSES[loss_type](
        chosen_logratios - rejected_logratios, beta, label_smoothing
    )
    chosen_rewards = beta * mx.stop_gradient(chosen_logratios)  # Eq. 5
    rejected_rewards = beta * mx.stop_gradient(rejected_logratios)
    return losses, chosen_rewards, rejected_rewards


def _check_logits(name, policy, reference, targets, mask):
    if policy.ndim != 3:
        raise ValueError(
            f"{name} logits must have shape (batch, seq, vocab), got {policy.shape}."
        )
    if policy.shape != reference.shape:
        raise ValueError(
            f"Policy and reference {name} logits differ in shape: "
            f"{policy.shape} and {reference.shape}."
        )
    for what, x in (("targets", targets), ("mask", mask)):
        if x is not None and x.shape != policy.shape[:2]:
            raise ValueError(
                f"{name}_{what} must have shape {policy.shape[:2]}, got {x.shape}."
            )


def dpo_loss(
    policy_chosen_logits: mx.array,
    policy_rejected_logits: mx.array,
    reference_chosen_logits: mx.array,
    reference_rejected_logits: mx.array,
    beta: float = 0.1,
    *,
    chosen_targets: mx.array | None = None,
    rejected_targets: mx.array | None = None,
    chosen_mask: mx.array | None = None,
    rejected_mask: mx.array | None = None,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
) -> mx.array:
    """
    The DPO loss of a batch of pairs, from both models' logits.

    ``-log sigmoid(beta * (log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l)))``,
    the mean over pairs. The log-prob of an answer is the sum over its tokens.

    Paper: https://arxiv.org/abs/2305.18290, Eq. 7.

    Args:
        policy_chosen_logits (mx.array): Shape: ``(B, L, V)``; position ``t``
            scores ``chosen_targets[:, t]``.
        policy_rejected_logits (mx.array): The same for the rejected answers,
            whose length may differ.
        reference_chosen_logits (mx.array): The frozen reference's logits.
        reference_rejected_logits (mx.array): The same for the rejected answers.
        beta (float): Inverse temperature. Default: ``0.1``.
        chosen_targets (mx.array): The tokens to score. Shape: ``(B, L)``.
        rejected_targets (mx.array): The same for the rejected answers.
        chosen_mask (mx.array, optional): True (or 1) where a token belongs to
            the answer. All tokens count if it is not given. Shape: ``(B, L)``.
        rejected_mask (mx.array, optional): The same for the rejected answers.
        label_smoothing (float): Probability that a label is wrong. Default: ``0``.
        loss_type (str): A key of ``LOSSES``. Default: ``"sigmoid"``.

    Returns:
        mx.array: The mean loss, a float32 scalar in nats. Only the policy's
        logits receive a gradient.

    Raises:
        ValueError: If targets are missing, shapes do not fit or an option is
            out of range.

    Example:
        >>> tokens = mx.array([[3, 1, 2]])
        >>> logits = mx.zeros((1, 2, 8))  # of model(tokens[:, :-1])
        >>> targets = {"chosen_targets": tokens[:, 1:]}
        >>> targets["rejected_targets"] = tokens[:, 1:]
        >>> round(dpo_loss(logits, logits, logits, logits, **targets).item(), 6)
        0.693147
    """
    if chosen_targets is None or rejected_targets is None:
        raise ValueError(
            "dpo_loss needs chosen_targets and rejected_targets: DPO compares the "
            "log-probs of the answers' tokens, and logits alone do not say which "
            "tokens were answered. With logits = model(tokens[:, :-1]) call "
            "dpo_loss(..., chosen_targets=chosen_tokens[:, 1:], "
            "rejected_targets=rejected_tokens[:, 1:])."
        )
    check_loss_options(beta, label_smoothing, loss_type)
    logps = []
    for name, policy, reference, targets, mask in (
        (
            "chosen",
            policy_chosen_logits,
            reference_chosen_logits,
            chosen_targets,
            chosen_mask,
        ),
        (
            "rejected",
            policy_rejected_logits,
            reference_rejected_logits,
            rejected_targets,
            rejected_mask,
        ),
    ):
        _check_logits(name, policy, reference, targets, mask)
        mask = None if mask is None else mask.astype(mx.bool_)
        scores = score_tokens(policy, reference, targets, mask)
        logps.append([x.sum(axis=-1) for x in scores[:2]])
    (chosen, reference_chosen), (rejected, reference_rejected) = logps
    losses, _, _ = preference_loss(
        chosen,
        rejected,
        reference_chosen,
        reference_rejected,
        beta,
        label_smoothing,
        loss_type,
    )
    return losses.mean()
