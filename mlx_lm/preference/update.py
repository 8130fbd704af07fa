# Copyright © 2026 MLX Contributors

"""From a batch's gradient to new weights: added up, averaged, clipped, or left out."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from .errors import InputError
from .ranks import average_over_ranks


def all_finite(tree: Any) -> mx.array:
    """Whether every number of a tree is finite."""
    sums = [mx.isfinite(x).all() for _, x in tree_flatten(tree)]
    return mx.stack(sums).all()


def gradient_accumulator(model: nn.Module) -> dict:
    """An empty accumulator for ``dpo_step``, in float32."""
    zeros = tree_map(
        lambda p: mx.zeros(p.shape, dtype=mx.float32), model.trainable_parameters()
    )
    return {"gradients": zeros, "pairs": mx.array(0.0)}


def accumulate(
    accumulator: dict,
    gradients: Any,
    pairs: mx.array,
    applies: mx.array,
    do_update: bool,
) -> tuple[Any, mx.array]:
    """Add a batch to those before it; an update empties what is kept."""
    add = lambda total, g: total + mx.where(applies, g, 0)
    gradients = tree_map(add, accumulator["gradients"], gradients)
    pairs = add(accumulator["pairs"], pairs)
    keep = mx.zeros_like if do_update else lambda x: x
    accumulator["gradients"] = tree_map(keep, gradients)
    accumulator["pairs"] = keep(pairs)
    return gradients, pairs


def update(
    policy_model: nn.Module,
    optimizer: Any,
    gradients: Any,
    pairs: mx.array,
    max_grad_norm: float | None,
) -> tuple[mx.array, mx.array, Any]:
    """Average the summed float32 gradients over all ranks' pairs, clip, apply."""
    joined = hasattr(optimizer, "join")
    if joined:
        gradients = optimizer.join(gradients)
    # One that is not finite, on any rank, changes nothing.
    gradients, pairs = average_over_ranks([gradients, pairs])
    # On average over ranks, and of uncertain labels, there may be less than one.
    scale = 1 / mx.where(pairs > 0, pairs, 1)
    gradients = tree_map(lambda g: g * scale, gradients)
    gradients, norm = optim.clip_grad_norm(gradients, max_grad_norm or float("inf"))
    applies = mx.logical_and(mx.isfinite(norm), pairs > 0)
    parameters = policy_model.trainable_parameters()
    if not hasattr(optimizer, "masters"):
        gradients = tree_map(lambda g, p: g.astype(p.dtype), gradients, parameters)
        optimizer.init(parameters)
    before = tree_map(lambda x: x, optimizer.state)
    optimizer.update(policy_model, gradients)
    choose = lambda new, old: mx.where(applies, new, old)
    updated = policy_model.trainable_parameters()
    state = tree_map(choose, optimizer.state, before)
    fill(optimizer.state, dict(tree_flatten(state)))
    if joined:
        optimizer.write(policy_model)
    else:
        policy_model.update(tree_map(choose, updated, parameters))
    return norm, applies, gradients


def fill(tree: Any, arrays: dict[str, mx.array], path: str = "") -> None:
    """Put other arrays into a tree, in place: compiled steps hold on to it."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        name = f"{path}{key}"
        if isinstance(tree[key], (dict, list)):
            fill(tree[key], arrays, f"{name}.")
        elif name not in arrays:
            raise InputError(f"The checkpoint has no {name}: it is of another run.")
        else:
            tree[key] = arrays[name]
