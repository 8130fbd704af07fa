# Copyright © 2026 MLX Contributors

"""From a model and a batch of pairs to the log-prob of every answer.

sequence_logps(model, batch)                    one model, with gradient
weighted_sequence_logps(model, batch)           and how likely it would write them
paired_sequence_logps(policy, reference, ...)   both, and their exact KL
  completion_states(model, batch)               trunk: plain, shared or packed
  completion_logps(model, states, targets)      head: chunk by chunk
  sum_by_row(values, batch, length_weights())   a number for each answer
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from .frozen import common_layers, running
from .head import completion_logps, completion_scores, paired_completion_logps
from .parts import head_logits
from .states import completion_states
from .tokens import token_log_sum_squares, token_logps


def length_weights(batch: dict[str, mx.array], ld_alpha: float) -> mx.array:
    """What each token counts if those beyond the pair's shorter answer count less."""
    # LD-DPO, https://arxiv.org/abs/2409.06411
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
    values: mx.array, batch: dict[str, mx.array], token_weights: mx.array | None = None
) -> mx.array:
    """Sum what was computed for each token over the batch's rows."""
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
    """The summed log-prob of every row's answer."""
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
    """The summed log-prob of every answer, and how likely the model would write it."""
    # WPO, https://arxiv.org/abs/2406.11827, Eq. 2: exp(mean(log p(y) - log sum p^2))
    states = completion_states(model, batch)
    functions = token_logps, token_log_sum_squares
    logps, squares = completion_scores(
        model, states, batch["targets"], functions, gradient=gradient
    )
    counts = sum_by_row(mx.ones(logps.shape), batch)
    aligned = sum_by_row(mx.stop_gradient(logps - squares), batch)
    confidences = mx.exp(aligned / mx.maximum(counts, 1))
    return sum_by_row(logps, batch, _weights(batch, ld_alpha)), confidences


def paired_sequence_logps(
    policy_model: Any,
    reference_model: Callable[[mx.array], mx.array],
    batch: dict[str, mx.array],
    *,
    ld_alpha: float = 1.0,
) -> tuple[mx.array, mx.array, mx.array]:
    """Summed log-probs under the policy and the reference, and their exact KL."""
    common = common_layers(policy_model, reference_model)
    with running(reference_model) as reference, common.recording():
        reference_states = completion_states(reference, batch)
    with common.replaying():
        policy_states = completion_states(policy_model, batch)

    def reference_logits(states):
        with running(reference_model) as reference:
            return head_logits(reference, states)

    policy_logps, reference_logps, kl = paired_completion_logps(
        partial(head_logits, policy_model),
        reference_logits,
        policy_states,
        reference_states,
        batch["targets"],
    )
    weights = _weights(batch, ld_alpha)
    return (
        sum_by_row(policy_logps, batch, weights),
        sum_by_row(reference_logps, batch, weights),
        sum_by_row(kl, batch),
    )
