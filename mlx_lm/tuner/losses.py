# Copyright © 2026 MLX Contributors

"""Preference losses, on logits and on log-probabilities.

    dpo_loss(four logits, targets, masks)     what a user calls
      score_tokens(policy, reference)         log-prob of every target, exact KL
      preference_loss(four summed logps)      per-pair losses and rewards
        LOSSES[loss_type].function            the formula alone

Everything from the logits on is float32.
"""

import mlx.core as mx

from ..preference.errors import InputError
from ..preference.forward.tokens import score_tokens
from ..preference.objective.losses import LOSSES
from ..preference.objective.objective import Objective, pair_losses, pair_rewards
from ..preference.objective.pairs import pair_logps
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
    nn,
)


def preference_loss(
    policy_chosen_logps: mx.array,
    policy_rejected_logps: mx.array,
    reference_chosen_logps: mx.array,
    reference_rejected_logps: mx.array,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    *,
    objective: Objective | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """
    Per-pair losses and rewards from summed log-probabilities.

    The implicit reward of an answer is ``beta * (policy - reference)``.

    Paper: https://arxiv.org/abs/2305.18290, Eq. 5 (rewards) and Eq. 7 (loss);
    ``LOSSES`` has those of the other losses.

    Args:
        policy_chosen_logps (mx.array): Log-prob of each chosen answer under the
            policy, in nats. Shape: ``(B,)``.
        policy_rejected_logps (mx.array): The same for the rejected answers.
        reference_chosen_logps (mx.array): Chosen, under the reference.
        reference_rejected_logps (mx.array): Rejected, under the reference.
        beta (float): Inverse temperature. Default: ``0.1``.
        label_smoothing (float): Probability that a label is wrong. Default: ``0``.
        loss_type (str): A key of ``LOSSES``. Default: ``"sigmoid"``.
        objective (Objective, optional): All of it, instead of these three.
        lengths (mx.array, optional): Tokens of the chosen and of the rejected
            answers, which losses per token need. Shape: ``(2, B)``.

    Returns:
        tuple: losses, chosen rewards and rejected rewards, each of shape
        ``(B,)`` in nats; no gradient flows through the rewards.

    Raises:
        ValueError: If an option is out of range, shapes differ, lengths are missing,
            or the loss does not learn from pairs.

    Example:
        >>> logps = [mx.array([x]) for x in (-10.0, -12.0, -11.0, -12.0)]
        >>> losses, chosen, rejected = preference_loss(*logps, beta=0.5)
        >>> [round(x.item(), 4) for x in (losses, chosen, rejected)]
        [0.4741, 0.5, 0.0]
    """
    policy_logps = [policy_chosen_logps, policy_rejected_logps]
    reference_logps = [reference_chosen_logps, reference_rejected_logps]
    shapes = [x.shape for x in policy_logps + reference_logps]
    if len(shapes[0]) != 1 or len({*shapes}) > 1:
        raise InputError(
            "Log-probs must be summed over answers, all four of one shape (pairs,), "
            f"got {', '.join(map(str, shapes))}."
        )
    objective = objective or Objective(beta, loss_type, label_smoothing=label_smoothing)
    per_token = [name for name in objective.losses if LOSSES[name].per_token]
    if per_token and lengths is None:
        raise InputError(f"{per_token[0]} needs the answers' lengths in tokens.")
    batch = {"weights": mx.ones(policy_chosen_logps.shape)}
    if lengths is not None:
        # Behind a prompt of one token.
        ends = lengths.reshape(-1) + 1
        batch["lengths"] = mx.stack([mx.ones_like(ends), ends], axis=-1)
    policy, reference = map(mx.concatenate, (policy_logps, reference_logps))
    pairs = pair_logps(policy, reference, batch, objective)
    return pair_losses(pairs, objective), *pair_rewards(pairs, objective)


def _score_answers(name, policy, reference, targets, mask):
    """The answers' log-probs under both models, and their lengths."""
    if policy.ndim != 3:
        raise InputError(
            f"{name} logits must have shape (batch, seq, vocab), got {policy.shape}."
        )
    if policy.shape != reference.shape:
        raise InputError(
            f"Policy and reference {name} logits differ in shape: "
            f"{policy.shape} and {reference.shape}."
        )
    for what, x in (("targets", targets), ("mask", mask)):
        if x is not None and x.shape != policy.shape[:2]:
            raise InputError(
                f"{name}_{what} must have shape {policy.shape[:2]}, got {x.shape}."
            )
    mask = None if mask is None else mask.astype(mx.bool_)
    scores = score_tokens(policy, reference, targets, mask)
    counted = mx.ones(targets.shape) if mask is None else mask
    return *(x.sum(axis=-1) for x in scores[:2]), counted.sum(axis=-1)


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
        raise InputError(
            "dpo_loss needs chosen_targets and rejected_targets: DPO compares the "
            "log-probs of the answers' tokens, and logits alone do not say which "
            "tokens were answered. With logits = model(tokens[:, :-1]) call "
            "dpo_loss(..., chosen_targets=chosen_tokens[:, 1:], "
            "rejected_targets=rejected_tokens[:, 1:])."
        )
    objective = Objective(beta, loss_type, label_smoothing=label_smoothing)
    sides = zip(
        ("chosen", "rejected"),
        (policy_chosen_logits, policy_rejected_logits),
        (reference_chosen_logits, reference_rejected_logits),
        (chosen_targets, rejected_targets),
        (chosen_mask, rejected_mask),
    )
    policy, reference, lengths = zip(*(_score_answers(*side) for side in sides))
    losses, _, _ = preference_loss(
        *policy, *reference, objective=objective, lengths=mx.concatenate(lengths)
    )
    return losses.mean()
