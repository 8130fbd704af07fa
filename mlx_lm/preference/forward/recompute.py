# Copyright © 2026 MLX Contributors

"""Gradient checkpointing and dropout that agree with each other."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial
from inspect import getattr_static
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ...models.activations import swiglu as _swiglu
from ...tuner.lora import LoRALinear
from ..errors import InputError
from ..features import Feature
from .dropout import KeyedDropout
from .parts import calls_replaced, leaves


def low_rank(x: mx.array, a: mx.array) -> mx.array:
    """``x @ a`` as precise as ``a``; ``x`` is kept as it is for the gradient."""
    return mx.checkpoint(lambda x, a: x @ a)(x, a)


def lean_swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """mlx-lm's ``swiglu``, with nothing but its arguments kept for the gradient."""
    return mx.checkpoint(_swiglu)(gate, x)


def _lean_call(module, original, x):
    if not module.training or x.dtype == module.lora_a.dtype:
        return original(x)
    z = low_rank(module.dropout(x), module.lora_a) @ module.lora_b
    return module.linear(x) + (module.scale * z).astype(x.dtype)


@cache
def _lean_class(cls):
    """The class with ``lean_swiglu`` where its methods call ``swiglu``, or None."""
    lean = {}
    for name in dir(cls):
        method = getattr_static(cls, name)
        if not isinstance(method, FunctionType):
            continue
        code, scope = method.__code__, method.__globals__
        if "swiglu" in code.co_names and scope.get("swiglu") is _swiglu:
            # Other globals: the module's own serve other models.
            scope = {**scope, "swiglu": lean_swiglu}
            given = method.__defaults__, method.__closure__
            lean[name] = FunctionType(code, scope, name, *given)
            lean[name].__kwdefaults__ = method.__kwdefaults__
    return type(cls.__name__, (cls,), lean) if lean else None


@contextmanager
def lean_layers(model: nn.Module) -> Iterator[None]:
    """Let a model's layers keep less for the gradient, until the end of the block."""
    adapters = [m for m in model.modules() if type(m) is LoRALinear]
    classes: list[tuple[nn.Module, Any]] = [(m, type(m)) for m in model.modules()]
    gated = [(m, cls) for m, cls in classes if _lean_class(cls)]
    try:
        for module, cls in gated:
            module.__class__ = _lean_class(cls)
        with calls_replaced((m, partial(_lean_call, m)) for m in adapters):
            yield
    finally:
        for module, cls in gated:
            module.__class__ = cls


# Their layers read what another layer leaves behind: recomputing one layer
# alone gives wrong gradients (measured against the plain backward).
NOT_RECOMPUTABLE = ("kimi_k3",)


class _Slot(int):
    """The place of an array in a call's arguments."""


def _take_arrays(tree):
    """The float arrays of a call's arguments, and how to put others in place."""
    arrays = []

    def take(x):
        if not isinstance(x, mx.array) or not mx.issubdtype(x.dtype, mx.floating):
            return x
        arrays.append(x)
        return _Slot(len(arrays) - 1)

    template = tree_map(take, tree)
    pick = lambda x, new: new[x] if isinstance(x, _Slot) else x
    return arrays, lambda new: tree_map(lambda x: pick(x, new), template)


def _set_keys(dropouts, key):
    for i, dropout in enumerate(dropouts):
        dropout.set_key(mx.random.split(key, len(dropouts))[i])


def _frozen_weights(layer):
    trained = {name for name, _ in tree_flatten(layer.trainable_parameters())}
    every = tree_flatten(layer.parameters())
    return tree_unflatten([x for x in every if x[0] not in trained])


def _recomputed(layer, dropouts, key, original, args, kwargs):
    """Call a layer so that the backward pass computes it again."""
    # Gradients flow through arguments and results alone: caches' arrays are both. Frozen
    # weights are arguments, too: compiling would find what is made of them alone, such as
    # DoRA's sums, to be the same in both passes, and keep it for every layer.
    caches = leaves([args, kwargs])
    saved = [kept.saved() for kept in caches]
    arrays, put = _take_arrays([args, kwargs])

    parameters = layer.trainable_parameters()
    weights = _frozen_weights(layer)

    def inner(parameters, frozen, key, before, arrays):
        layer.update(tree_map(mx.stop_gradient, frozen))
        layer.update(parameters)
        if key is not None:
            # The recompute asks for a gradient of every argument.
            _set_keys(dropouts, mx.stop_gradient(key))
        for kept, state, old in zip(caches, saved, before):
            kept.restore(state, old)
        args, kwargs = put(arrays)
        result = original(*args, **kwargs)
        layer.update(weights)
        # An array that is returned twice would lose its second gradient.
        again = lambda x: None if x is None else x * 1
        return result, tree_map(again, [kept.arrays for kept in caches])

    before = [kept.arrays for kept in caches]
    result, after = mx.checkpoint(inner)(parameters, weights, key, before, arrays)
    for kept, new in zip(caches, after):
        kept.arrays = new
    return result


def _keyed_call(layer, dropouts, checkpoint, original, *args, **kwargs):
    """A layer's call that passes keys to its dropouts, and may recompute."""
    if not layer.training:
        return original(*args, **kwargs)
    key = None
    if dropouts:
        # Drawn here, so that forward and recompute get the same one.
        key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)
    if checkpoint:
        return _recomputed(layer, dropouts, key, original, args, kwargs)
    _set_keys(dropouts, key)
    return original(*args, **kwargs)


@contextmanager
def keyed_layers(model: nn.Module, checkpoint: bool) -> Iterator[None]:
    """Give the layers of one model keyed dropout and, if asked, checkpointing."""
    model_type = getattr(model, "model_type", None)
    if checkpoint and model_type in NOT_RECOMPUTABLE:
        raise InputError(
            f"grad_checkpoint gives wrong gradients for model_type {model_type!r}. "
            "Turn it off, and lower batch_size or max_seq_length to save memory."
        )
    calls = []
    with ExitStack() as stack:
        for layer in model.layers:
            plain = [
                (name, module)
                for name, module in layer.named_modules()
                if isinstance(module, nn.Dropout) and module._p_1 < 1
            ]
            if not plain and not checkpoint:
                continue
            keyed = [(name, KeyedDropout(1 - module._p_1)) for name, module in plain]
            stack.callback(layer.update_modules, tree_unflatten(plain))
            layer.update_modules(tree_unflatten(keyed))
            dropouts = [module for _, module in keyed]
            calls.append((layer, partial(_keyed_call, layer, dropouts, checkpoint)))
        with lean_layers(model), calls_replaced(calls):
            yield


class _Recompute(Feature):
    def around(self, model: Any, args: Any, folder: Any) -> AbstractContextManager:
        return keyed_layers(model, args.grad_checkpoint)


FEATURE = _Recompute()
