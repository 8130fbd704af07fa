# Copyright © 2026 MLX Contributors

"""Tokens scored by the kernels, where the device has any that take the logits."""

import mlx.core as mx

from ...kernels.preference_logps import (
    DTYPES,
    preference_backend,
    preference_logps,
    preference_logps_vjp,
)
from .tokens import KERNELS


def _kernel_function(kl_gradient):
    @mx.custom_function
    def scores(policy_logits, targets, mask, *reference):
        reference_logits = reference[0] if reference else None
        arrays = (policy_logits, reference_logits, targets, mask)
        return preference_logps(*arrays, backend=preference_backend())

    @scores.vjp
    def scores_vjp(primals, cotangents, outputs):
        policy_logits, targets, mask, *reference = primals
        reference_logits, saved, given = None, outputs[1][:2], cotangents[0][:1]
        if reference and kl_gradient:
            reference_logits, saved, given = reference[0], outputs[1], cotangents[0]
        arrays = (policy_logits, reference_logits, targets, mask, saved, given)
        gradient = preference_logps_vjp(*arrays, backend=preference_backend())
        # Nothing asks for the others, so these zeros are never computed.
        return gradient, *(mx.zeros_like(x) for x in primals[1:])

    return scores


# Where the KL carries no gradient, no reference logits wait for the backward pass.
_KERNEL_FUNCTIONS = {flag: _kernel_function(flag) for flag in (False, True)}


def _applies(logits):
    known = all(x.dtype in DTYPES and x.size > 0 for x in logits)
    same_width = len({x.shape for x in logits}) == 1
    return known and same_width and preference_backend() is not None


def kernel_scores(
    policy_logits: mx.array,
    reference_logits: mx.array | None,
    targets: mx.array,
    mask: mx.array | None,
    kl_gradient: bool = False,
) -> list[mx.array] | None:
    """Log-probs of targets, under two models with the KL, or None without a kernel."""
    logits = [policy_logits, *([] if reference_logits is None else [reference_logits])]
    if not _applies(logits):
        return None
    width = policy_logits.shape[-1]
    if mask is None:
        mask = mx.ones(targets.shape, dtype=mx.bool_)
    arrays = [
        policy_logits.reshape(-1, width),
        targets.astype(mx.int32).reshape(-1),
        (mask != 0).reshape(-1),
    ]
    if reference_logits is not None:
        arrays.append(reference_logits.reshape(-1, width))
    scores, _ = _KERNEL_FUNCTIONS[kl_gradient](*arrays)
    return [x.reshape(targets.shape) for x in scores]


KERNELS.append(kernel_scores)
