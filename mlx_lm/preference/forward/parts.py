# Copyright © 2026 MLX Contributors

"""A language model taken apart, whatever its family: trunk, layers and head.

No family is known by name. Some modules are run through other functions for the
length of a call: the trunk's output is caught on its way to the head, and the
head runs alone when the trunk is made to return what it is given.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...models.cache import CacheList

# An attribute of a model that was found to be another function in parts.
RUN_WHOLE = "_run_whole"
# A class lives in a cycle with itself, and would keep what a call of its own holds.
_calls: dict[tuple[int, type], Callable] = {}


@cache
def _replaced_class(cls):
    def replaced(self, *args, **kwargs):
        call = _calls[id(self), new]
        return call(partial(cls.__call__, self), *args, **kwargs)

    new = type(cls.__name__, (cls,), {"__call__": replaced})
    return new


@contextmanager
def calls_replaced(
    replacements: Iterable[tuple[nn.Module, Callable[..., Any]]],
) -> Iterator[None]:
    """Run some modules through other functions, until the end of the block."""
    changed = []
    try:
        for module, call in replacements:
            cls: Any = type(module)
            changed.append((module, cls))
            module.__class__ = _replaced_class(cls)
            _calls[id(module), type(module)] = call
        yield
    finally:
        for module, cls in reversed(changed):
            _calls.pop((id(module), type(module)), None)
            module.__class__ = cls


def find_trunk(model: Any) -> nn.Module | None:
    """Find the module that holds a model's layers, and returns hidden states."""
    layers = getattr(model, "layers", None)
    whole = getattr(model, RUN_WHOLE, False)
    if whole or not layers or not isinstance(model, nn.Module):
        return None
    first, waiting = layers[0], [(model, None)]
    while waiting:
        module, called = waiting.pop(0)
        if callable(module) and module is not model:
            called = module
        for child in module.values():
            if isinstance(child, list) and any(x is first for x in child):
                return called
        waiting += [(c, called) for c in module.values() if isinstance(c, nn.Module)]
    return None


def trunk_states(model: Any, tokens: mx.array, cache: Any = None) -> mx.array:
    """What the trunk hands to the head: the final hidden states."""
    caches = {} if cache is None else {"cache": cache}
    trunk = find_trunk(model)
    if trunk is None:
        return model(tokens, **caches)
    caught = []

    def catch(call, *args, **kwargs):
        caught.append(call(*args, **kwargs))
        return caught[-1]

    # The head runs too, but nothing asks for its output, so it costs nothing.
    with calls_replaced([(trunk, catch)]):
        model(tokens, **caches)
    return caught[-1]


def head_logits(model: Any, states: mx.array) -> mx.array:
    """The model's own head on some hidden states."""
    trunk = find_trunk(model)
    if trunk is None:
        return states
    tokens = mx.zeros((1, states.shape[0]), dtype=mx.int32)
    with calls_replaced([(trunk, lambda call, *args, **kwargs: states[None])]):
        return model(tokens)[0]


def leaves(caches: Any) -> list:
    """The single caches that hand arrays on, in a cache, a list of them, or nothing."""
    if isinstance(caches, CacheList):
        caches = caches.caches
    if isinstance(caches, dict):
        caches = list(caches.values())
    if isinstance(caches, (list, tuple)):
        return [leaf for cache in caches for leaf in leaves(cache)]
    return [caches] if hasattr(caches, "arrays") else []
