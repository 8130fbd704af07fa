# Copyright © 2026 MLX Contributors

"""The layers below the first trained one, computed once for both models.

A policy and its frozen start have them in common. While the reference runs, what
these layers return is kept; while the policy runs on the same batch, they return
that. With adapters on the last 8 of 30 layers a reference forward then adds 8.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from .model_parts import calls_replaced, find_trunk
from .shared_prompt import leaves


def frozen_layers(model: Any) -> list[nn.Module]:
    """
    The layers that come before everything that is trained.

    Args:
        model (nn.Module): The policy, its trainable parameters set up.

    Returns:
        list: The first layers, as far as nothing is trained in or before them.

    Example:
        >>> frozen_layers(lambda tokens: tokens)
        []
    """
    trunk = find_trunk(model)
    if trunk is None:
        return []
    layers = model.layers
    result: list[nn.Module] = []
    trained = {id(x) for _, x in tree_flatten(model.trainable_parameters())}
    in_layers = {id(x) for l in layers for _, x in tree_flatten(l.parameters())}
    in_trunk = {id(x) for _, x in tree_flatten(trunk.parameters())}
    if trained & (in_trunk - in_layers):
        return []
    for layer in layers:
        if any(id(x) in trained for _, x in tree_flatten(layer.parameters())):
            return result
        result.append(layer)
    return result


class FrozenLayers:
    """
    What the frozen layers of a model returned, to be returned again.

    Args:
        model (nn.Module): The policy, its trainable parameters set up.

    Example:
        >>> memory = FrozenLayers(lambda tokens: tokens)
        >>> with memory.recording():
        ...     pass
        >>> with memory.replaying():
        ...     pass
    """

    def __init__(self, model: Any):
        self._layers = frozen_layers(model)
        self._outputs: list[list] = [[] for _ in self._layers]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """
        Keep what the frozen layers return, call by call.

        Example:
            >>> with FrozenLayers(None).recording():
            ...     pass
        """

        def record(outputs):
            def call(original, *args, **kwargs):
                result = original(*args, **kwargs)
                arrays = [cache.arrays for cache in leaves([args, kwargs])]
                outputs.append((result, arrays))
                return result

            return call

        calls = [(l, record(o)) for l, o in zip(self._layers, self._outputs)]
        with calls_replaced(calls):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """
        Return what was kept, in the same order of calls.

        Example:
            >>> with FrozenLayers(None).replaying():
            ...     pass
        """

        def replay(outputs):
            kept = iter(outputs)

            def call(original, *args, **kwargs):
                result, arrays = next(kept)
                # Layers above may share this one's keys and values.
                for cache, values in zip(leaves([args, kwargs]), arrays):
                    cache.arrays = values
                return result

            return call

        calls = [(l, replay(o)) for l, o in zip(self._layers, self._outputs)]
        with calls_replaced(calls):
            yield
