# Copyright © 2026 MLX Contributors

"""The log-prob of every target token under two models, and their exact KL.

Everything from the logits on is float32. Kernels run where there are any, chosen at
each call; tests compare them with the plain functions, which run elsewhere.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ..plug_ins import load

# What scores tokens instead of the plain functions, if it says anything.
KERNELS: list[Callable[..., list[mx.array] | None]] = []


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


def _plain_logsumexp_and_logps(x, targets, mask):
    if mask is not None:
        targets = mx.where(mask, targets, 0)
    known = mx.logical_and(targets >= 0, targets < x.shape[-1])
    targets = mx.where(known, targets, 0)[..., None]
    total = _logsumexp(x)
    logps = mx.take_along_axis(x, targets, axis=-1).squeeze(-1) - total
    logps = mx.where(known, logps, mx.nan)
    return total, logps if mask is None else mx.where(mask, logps, 0.0)


def _plain_score_tokens(policy_logits, reference_logits, targets, mask):
    x = policy_logits.astype(mx.float32)
    y = reference_logits.astype(mx.float32)
    x_total, policy_logps = _plain_logsumexp_and_logps(x, targets, mask)
    y_total, reference_logps = _plain_logsumexp_and_logps(y, targets, mask)
    # Checkpoints of one family may pad the same vocabulary to other widths.
    width = min(x.shape[-1], y.shape[-1])
    x, y = x[..., :width], y[..., :width]
    p = mx.exp(x - x_total[..., None])
    # A token of probability 0 adds nothing, also where its logits are -inf.
    gap = mx.where(p > 0, x - y, 0.0) - (x_total - y_total)[..., None]
    kl = mx.maximum((p * gap).sum(axis=-1), 0.0)
    kl = kl if mask is None else mx.where(mask, kl, 0.0)
    return policy_logps, reference_logps, kl


@contextmanager
def without_kernels() -> Iterator[None]:
    """Score with plain operations until the end of the block."""
    kept = KERNELS[:]
    KERNELS.clear()
    try:
        yield
    finally:
        KERNELS[:] = kept


def _from_kernel(*arrays):
    return next(filter(None, (kernel(*arrays) for kernel in KERNELS)), None)


def token_logps(
    logits: mx.array, targets: mx.array, mask: mx.array | None = None
) -> mx.array:
    """The log-probability of every target token."""
    if found := _from_kernel(logits, None, targets, mask):
        return found[0]
    return _plain_logsumexp_and_logps(logits.astype(mx.float32), targets, mask)[1]


def token_log_sum_squares(logits: mx.array, _: Any = None) -> mx.array:
    """``log sum_v p(v)^2``: 0 where the model is sure, down to ``-log V``."""
    x = mx.stop_gradient(logits).astype(mx.float32)
    # The difference below would lose what large logits have in common.
    x = x - x.max(axis=-1, keepdims=True)
    return _logsumexp(2 * x) - 2 * _logsumexp(x)


def score_tokens(
    policy_logits: mx.array,
    reference_logits: mx.array,
    targets: mx.array,
    mask: mx.array | None = None,
    *,
    kl_gradient: bool = False,
) -> tuple[mx.array, mx.array, mx.array]:
    """Both models' log-prob of every target, and the exact KL between them."""
    reference_logits = mx.stop_gradient(reference_logits)
    arrays = (policy_logits, reference_logits, targets, mask)
    found = _from_kernel(*arrays, kl_gradient) or _plain_score_tokens(*arrays)
    policy_logps, reference_logps, kl = found
    if not kl_gradient:
        kl = mx.stop_gradient(kl)
    return policy_logps, reference_logps, kl


# Each adds to the table.
PLUG_INS = ("fused",)
load(__package__, PLUG_INS)
