# Copyright © 2026 MLX Contributors

"""From a model and a batch of pairs to the log-prob of every answer."""

from typing import Callable

import mlx.core as mx

from .token_scores import score_tokens, token_logps


def completion_mask(lengths: mx.array, width: int) -> mx.array:
    """
    Mark the target positions that belong to a completion.

    Target ``t`` is token ``t + 1``: it counts if ``prompt <= t + 1 < total``.

    Args:
        lengths (mx.array): Prompt length and whole length of each row, in
            tokens. Shape: ``(N, 2)``.
        width (int): Number of target positions, one less than of tokens.

    Returns:
        mx.array: Boolean mask. Shape: ``(N, width)``.

    Example:
        >>> completion_mask(mx.array([[2, 4]]), 4).tolist()
        [[False, True, True, False]]
    """
    steps = mx.arange(1, width + 1)
    return mx.logical_and(steps >= lengths[:, 0:1], steps < lengths[:, 1:2])


def sequence_logps(
    model: Callable[[mx.array], mx.array], tokens: mx.array, lengths: mx.array
) -> mx.array:
    """
    The summed log-prob of every row's completion.

    Args:
        model (Callable): Maps tokens ``(N, L)`` to logits ``(N, L, V)``.
        tokens (mx.array): Prompt and completion, padded on the right. Shape:
            ``(N, L)``.
        lengths (mx.array): Prompt length and whole length of each row, in
            tokens. Shape: ``(N, 2)``.

    Returns:
        mx.array: float32 log-probs in nats. Shape: ``(N,)``.

    Example:
        >>> uniform = lambda tokens: mx.zeros((*tokens.shape, 4))
        >>> sequence_logps(uniform, mx.array([[1, 2, 3]]), mx.array([[1, 3]])).item()
        -2.7725887298583984
    """
    mask = completion_mask(lengths, tokens.shape[1] - 1)
    return token_logps(model(tokens[:, :-1]), tokens[:, 1:], mask).sum(axis=-1)


def paired_sequence_logps(
    model: Callable[[mx.array], mx.array],
    reference_logits: mx.array,
    tokens: mx.array,
    lengths: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """
    Summed log-probs under the policy and the reference, and their exact KL.

    Args:
        model (Callable): The policy, maps tokens ``(N, L)`` to logits.
        reference_logits (mx.array): The reference's logits for ``tokens[:, :-1]``.
            Shape: ``(N, L - 1, V)``.
        tokens (mx.array): Prompt and completion, padded on the right. Shape:
            ``(N, L)``.
        lengths (mx.array): Prompt length and whole length of each row, in
            tokens. Shape: ``(N, 2)``.

    Returns:
        tuple: policy log-probs, reference log-probs and KL(policy || reference)
        summed over each completion, float32 in nats. Shape: ``(N,)`` each.

    Example:
        >>> model = lambda tokens: mx.zeros((*tokens.shape, 4))
        >>> tokens, lengths = mx.array([[1, 2, 3]]), mx.array([[1, 3]])
        >>> out = paired_sequence_logps(model, model(tokens[:, 1:]), tokens, lengths)
        >>> [round(x.item(), 3) for x in out]
        [-2.773, -2.773, 0.0]
    """
    mask = completion_mask(lengths, tokens.shape[1] - 1)
    logits = model(tokens[:, :-1])
    scores = score_tokens(logits, reference_logits, tokens[:, 1:], mask)
    policy_logps, reference_logps, kl = (x.sum(axis=-1) for x in scores)
    return policy_logps, reference_logps, kl
