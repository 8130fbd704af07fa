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


def _logsumexp(x, block=128):
    # The CPU adds a row into one float32: over a vocabulary of 49,152 this
    # loses 1e-4 nats a token, always downwards. Two levels lose 1e-6.
    whole = x.shape[-1] // block * block
    if whole in (0, block):
        return mx.logsumexp(x, axis=-1)
    blocks = x[..., :whole].reshape(*x.shape[:-1], -1, block)
    total = mx.logsumexp(mx.logsumexp(blocks, axis=-1), axis=-1)
    if whole < x.shape[-1]:
        total = mx.logaddexp(total, mx.logsumexp(x[..., whole:], axis=-1))
    return total


def token_logps(
    logits: mx.array, targets: mx.array, mask: mx.array | None = None
) -> mx.array:
    """
    The log-probability of every target token.

    Args:
        logits (mx.array): Unnormalised scores; position ``t`` scores the token
            ``targets[:, t]``. Shape: ``(B, L, V)``.
        targets (mx.array): Token ids, ignored where masked. Shape: ``(B, L)``.
        mask (mx.array, optional): True where a token counts. Shape: ``(B, L)``.

    Returns:
        mx.array: float32 log-probs in nats, exactly 0 where masked. Shape:
        ``(B, L)``.

    Example:
        >>> token_logps(mx.zeros((1, 1, 4)), mx.array([[2]])).item()
        -1.3862943649291992
    """
    if mask is not None:
        targets = mx.where(mask, targets, 0)
    if mx.default_device() == mx.cpu:
        logits = logits.astype(mx.float32)
        scores = mx.take_along_axis(logits, targets[..., None], axis=-1)
        logps = scores.squeeze(-1) - _logsumexp(logits)
    else:
        logps = -mx.fast.cross_entropy(logits, targets)
    return logps if mask is None else mx.where(mask, logps, 0.0)


def score_tokens(
    policy_logits: mx.array,
    reference_logits: mx.array,
    targets: mx.array,
    mask: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """
    Both models' log-prob of every target, and the exact KL between them.

    ``KL(policy || reference) = sum_v p(v) * (log p(v) - log q(v))`` over the
    whole vocabulary. Gradients flow through the policy's log-probs only.

    Args:
        policy_logits (mx.array): Shape: ``(B, L, V)``.
        reference_logits (mx.array): Shape: ``(B, L, V)``.
        targets (mx.array): Token ids. Shape: ``(B, L)``.
        mask (mx.array): True where a token counts. Shape: ``(B, L)``.

    Returns:
        tuple: policy log-probs, reference log-probs and KL of every token, each
        float32 in nats, exactly 0 where masked. Shape: ``(B, L)``.

    Example:
        >>> x = mx.array([[[0.0, 1.0, 2.0]]])
        >>> *_, kl = score_tokens(x, x, mx.array([[1]]), mx.array([[True]]))
        >>> kl.item()
        0.0
    """
    policy_logps = token_logps(policy_logits, targets, mask)
    reference_logps = mx.stop_gradient(token_logps(reference_logits, targets, mask))
    # Checkpoints of one family may pad the same vocabulary to other widths.
    width = min(policy_logits.shape[-1], reference_logits.shape[-1])
    x = mx.stop_gradient(policy_logits[..., :width]).astype(mx.float32)
    y = mx.stop_gradient(reference_logits[..., :width]).astype(mx.float32)
    # With both log-probs at hand no further sum over exponentials is needed:
    # log p(v) - log q(v) is the target's, plus how much x - y differs from there.
    difference = x - y
    targets = mx.where(mask, targets, 0)[..., None]
    difference = difference - mx.take_along_axis(difference, targets, axis=-1)
    scores = mx.take_along_axis(x, targets, axis=-1)
    p = mx.exp(x - scores + mx.stop_gradient(policy_logps)[..., None])
    # A token of probability 0 adds nothing, also where its logits are -inf.
    kl = mx.where(p > 0, p * difference, 0.0).sum(axis=-1)
    kl = mx.maximum(kl + mx.stop_gradient(policy_logps) - reference_logps, 0.0)
    return policy_logps, reference_logps, mx.where(mask, kl, 0.0)


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
        reference = mx.stop_gradient(reference)
        logps.append(
            tuple(token_logps(x, targets, mask).sum(-1) for x in (policy, reference))
        )
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
