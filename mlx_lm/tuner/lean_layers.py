# Copyright © 2026 MLX Contributors

"""Layers that keep less of the forward pass for the gradient.

What is cheap to compute again is not kept: the float32 copy of its 16-bit input that
an adapter makes, and what a gated MLP computes between its two products and theirs.
Together they are a third of what the layers of a LoRA step hold. Neither values nor
gradients change.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lm.models.activations import swiglu

from .lora import LoRALinear
from .model_parts import calls_replaced


def low_rank(x: mx.array, a: mx.array) -> mx.array:
    """
    ``x @ a`` in the precision of ``a``, with ``x`` kept as it is for the gradient.

    Args:
        x (mx.array): Inputs. Shape: ``(..., D)``.
        a (mx.array): The first matrix of an adapter. Shape: ``(D, r)``.

    Returns:
        mx.array: Shape: ``(..., r)``.

    Example:
        >>> low_rank(mx.ones((1, 2), mx.bfloat16), mx.ones((2, 3))).tolist()
        [[2.0, 2.0, 2.0]]
    """
    return mx.checkpoint(lambda x, a: x @ a)(x, a)


def lean_swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """
    mlx-lm's ``swiglu``, with nothing but its arguments kept for the gradient.

    Args:
        gate (mx.array): Goes through SiLU.
        x (mx.array): Multiplies it. Shape: as ``gate``.

    Returns:
        mx.array: Shape: as ``gate``.

    Example:
        >>> lean_swiglu(mx.zeros((2,)), mx.ones((2,))).tolist()
        [0.0, 0.0]
    """
    return mx.checkpoint(swiglu)(gate, x)


def _lean_call(module):
    def call(original, x):
        if not module.training or x.dtype == module.lora_a.dtype:
            return original(x)
        z = low_rank(module.dropout(x), module.lora_a) @ module.lora_b
        return module.linear(x) + (module.scale * z).astype(x.dtype)

    return call


@contextmanager
def lean_layers(model: nn.Module) -> Iterator[None]:
    """
    Let a model's layers keep less for the gradient, until the end of the block.

    Args:
        model (nn.Module): A model. LoRA layers of this model, and gated MLPs of its
            family, are changed; others stay as they are.

    Example:
        >>> model = nn.Sequential(LoRALinear.from_base(nn.Linear(2, 2)))
        >>> with lean_layers(model):
        ...     model(mx.ones((1, 2))).shape
        (1, 2)
    """
    adapters = [m for m in model.modules() if type(m) is LoRALinear]
    # Models call it by a name of their own module.
    files: Any = {sys.modules[type(m).__module__] for m in model.modules()}
    gated = [f for f in files if getattr(f, "swiglu", None) is swiglu]
    try:
        for file in gated:
            file.swiglu = lean_swiglu
        with calls_replaced((m, _lean_call(m)) for m in adapters):
            yield
    finally:
        for file in gated:
            file.swiglu = swiglu
