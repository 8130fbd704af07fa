# Copyright © 2026 MLX Contributors

"""From a model and a batch of pairs to the log-prob of every answer.

sequence_logps(model, batch)                    one model, with gradient
weighted_sequence_logps(model, batch)           and how likely it would write them
paired_sequence_logps(policy, reference, ...)   both, and their exact KL
  completion_states(model, batch)               trunk: shared, plain or packed
  completion_logps(model, states, targets)      head: chunk by chunk
  sum_by_row(values, batch, length_weights())   a number for each answer
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .completion_head import (
    completion_logps,
    completion_scores,
    paired_completion_logps,
)
from .frozen_layers import FrozenLayers
from .model_parts import head_logits
from .packing import packed_states
from .reference import FrozenStart, running
from .shared_prompt import plain_states, shared_states


def completion_states(model: Any, batch: dict[str, mx.array]) -> mx.array:
    """
    The hidden states that predict the answers' tokens.

    Args:
        model (Callable): A language model.
        batch (dict): What ``collate_pairs`` made; it says whether prompts are
            shared or rows packed.

    Returns:
        mx.array: One for every scored position of the batch. Shape: ``(N, D)``.

    Example:
        >>> batch = {"inputs": mx.array([[3, 4]]), "positions": mx.array([1])}
        >>> one_hot = lambda tokens: mx.eye(8)[tokens]
        >>> completion_states(one_hot, batch).argmax().item()
        4
    """
    if "segments" in batch:
        states = packed_states(model, batch)
    else:
        states = (shared_states if "prompts" in batch else plain_states)(model, batch)
    return states.reshape(-1, states.shape[-1])[batch["positions"]]


def length_weights(batch: dict[str, mx.array], ld_alpha: float) -> mx.array:
    """
    What each token counts if those beyond the pair's shorter answer count less.

    LD-DPO, https://arxiv.org/abs/2409.06411: an answer's first tokens, as
    many as the shorter answer has, count once and the rest ``ld_alpha`` times.

    Args:
        batch (dict): What ``collate_pairs`` made of ``B`` pairs.
        ld_alpha (float): From 0 to 1, at which all tokens count the same.

    Returns:
        mx.array: float32, for each scored position; without a meaning for filling.
        Shape: ``(N,)``.

    Example:
        >>> from mlx_lm.tuner.preference_batches import collate_pairs
        >>> batch = collate_pairs([([1], [2], [3, 4, 5], (1, 2, 4))])
        >>> length_weights(batch, 0.5).tolist()[:4]
        [1.0, 1.0, 0.5, 0.5]
    """
    rows = batch["rows"]
    is_row = rows == mx.arange(batch["lengths"].shape[0])[:, None]
    # Without a prompt there are fewer scored tokens than the answer has.
    counts = is_row.sum(axis=-1)
    shared = mx.minimum(*mx.split(counts, 2))
    # A row's tokens follow each other.
    ends = mx.cumsum(counts) - counts + mx.concatenate([shared, shared])
    end = mx.where(is_row, ends[:, None], 0).sum(axis=0)
    return mx.where(mx.arange(rows.size) < end, 1.0, ld_alpha)


def _weights(batch, ld_alpha):
    return None if ld_alpha == 1 else length_weights(batch, ld_alpha)


def sum_by_row(
    values: mx.array,
    batch: dict[str, mx.array],
    token_weights: mx.array | None = None,
) -> mx.array:
    """
    Sum what was computed for each token over the batch's rows.

    Args:
        values (mx.array): One number for each scored position. Shape: ``(N,)``.
        batch (dict): For ``rows``, of shape ``(N,)``: the row of each position,
            ``2B`` for filling; and for the number of rows.
        token_weights (mx.array, optional): Factors of the values. Shape: ``(N,)``.

    Returns:
        mx.array: Shape: ``(2B,)``.

    Example:
        >>> batch = {"rows": mx.array([0, 0, 2]), "lengths": mx.zeros((2, 2))}
        >>> sum_by_row(mx.array([1.0, 2.0, 9.0]), batch).tolist()
        [3.0, 0.0]
    """
    if token_weights is not None:
        values = values * token_weights
    # Not a scatter: the GPU would add in another order each time.
    rows = mx.arange(batch["lengths"].shape[0])[:, None]
    return mx.where(batch["rows"] == rows, values, 0).sum(axis=-1)


def sequence_logps(
    model: Any,
    batch: dict[str, mx.array],
    *,
    gradient: bool = False,
    ld_alpha: float = 1.0,
) -> mx.array:
    """
    The summed log-prob of every row's answer.

    Args:
        model (Callable): A language model.
        batch (dict): What ``collate_pairs`` made of ``B`` pairs.
        gradient (bool): Whether the result will be differentiated. Default:
            ``False``.
        ld_alpha (float): See ``length_weights``. Default: ``1``.

    Returns:
        mx.array: float32 log-probs in nats, chosen rows first. Shape: ``(2B,)``.

    Example:
        >>> from mlx_lm.tuner.preference_batches import collate_pairs
        >>> uniform = lambda tokens: mx.zeros((*tokens.shape, 4))
        >>> batch = collate_pairs([([1], [2, 3], [3], (1, 3, 2))])
        >>> sequence_logps(uniform, batch).tolist()
        [-2.7725887298583984, -1.3862943649291992]
    """
    states = completion_states(model, batch)
    logps = completion_logps(model, states, batch["targets"], gradient=gradient)
    return sum_by_row(logps, batch, _weights(batch, ld_alpha))


def weighted_sequence_logps(
    model: Any,
    batch: dict[str, mx.array],
    *,
    gradient: bool = False,
    ld_alpha: float = 1.0,
) -> tuple[mx.array, mx.array]:
    """
    The summed log-prob of every answer, and how likely the model would write it.

    WPO, https://arxiv.org/abs/2406.11827, Eq. 2, in TRL's form:
    ``exp(mean_t(log p(y_t) - log sum_v p(v)^2))``; the pair's weight is the product
    of its answers' numbers.

    Args:
        model (Callable): A language model.
        batch (dict): What ``collate_pairs`` made of ``B`` pairs.
        gradient (bool): Whether the log-probs will be differentiated. Default:
            ``False``.
        ld_alpha (float): See ``length_weights``; for the log-probs alone. Default:
            ``1``.

    Returns:
        tuple: float32 log-probs in nats, and the answers' numbers without gradient,
        1 for filling; chosen rows first. Shape: ``(2B,)`` each.

    Example:
        >>> from mlx_lm.tuner.preference_batches import collate_pairs
        >>> uniform = lambda tokens: mx.zeros((*tokens.shape, 4))
        >>> batch = collate_pairs([([1], [2, 3], [3], (1, 3, 2))])
        >>> weighted_sequence_logps(uniform, batch)[1].tolist()
        [1.0, 1.0]
    """
    states = completion_states(model, batch)
    logps, squares = completion_scores(
        model, states, batch["targets"], gradient=gradient
    )
    counts = sum_by_row(mx.ones(logps.shape), batch)
    aligned = sum_by_row(mx.stop_gradient(logps) - squares, batch)
    confidences = mx.exp(aligned / mx.maximum(counts, 1))
    return sum_by_row(logps, batch, _weights(batch, ld_alpha)), confidences


def paired_sequence_logps(
    policy_model: Any,
    reference_model: Callable[[mx.array], mx.array],
    batch: dict[str, mx.array],
    *,
    ld_alpha: float = 1.0,
) -> tuple[mx.array, mx.array, mx.array]:
    """
    Summed log-probs under the policy and the reference, and their exact KL.

    Args:
        policy_model (Callable): A language model.
        reference_model (Callable): A ``FrozenStart`` or another model.
        batch (dict): What ``collate_pairs`` made of ``B`` pairs.
        ld_alpha (float): See ``length_weights``; the KL counts all tokens the same.
            Default: ``1``.

    Returns:
        tuple: policy log-probs, reference log-probs and KL(policy || reference)
        summed over each answer, float32 in nats. Shape: ``(2B,)`` each.

    Example:
        >>> from mlx_lm.tuner.preference_batches import collate_pairs
        >>> model = lambda tokens: mx.zeros((*tokens.shape, 4))
        >>> batch = collate_pairs([([1], [2, 3], [3], (1, 3, 2))])
        >>> paired_sequence_logps(model, model, batch)[2].tolist()
        [0.0, 0.0]
    """
    # Layers that policy and reference have in common run once.
    own = isinstance(reference_model, FrozenStart)
    frozen = FrozenLayers(policy_model if own else None)
    with running(reference_model) as reference, frozen.recording():
        reference_states = completion_states(reference, batch)
    with frozen.replaying():
        policy_states = completion_states(policy_model, batch)

    def reference_logits(states):
        with running(reference_model) as reference:
            return head_logits(reference, states)

    scores = paired_completion_logps(
        lambda states: head_logits(policy_model, states),
        reference_logits,
        policy_states,
        reference_states,
        batch["targets"],
    )
    weights = _weights(batch, ld_alpha)
    policy_logps, reference_logps = (sum_by_row(x, batch, weights) for x in scores[:2])
    return policy_logps, reference_logps, sum_by_row(scores[2], batch)
