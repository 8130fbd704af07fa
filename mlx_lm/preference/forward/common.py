# Copyright © 2026 MLX Contributors

"""Layers that policy and reference have in common, which run once."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import mlx.nn as nn

from .frozen import COMMON, FrozenStart, parameter_ids
from .parts import calls_replaced, find_trunk, leaves


def frozen_layers(model: Any) -> list[nn.Module]:
    """The layers in which nothing is trained, nor around them in the trunk."""
    trunk = find_trunk(model)
    if trunk is None:
        return []
    trained = parameter_ids(model.trainable_parameters())
    in_layers = [parameter_ids(layer.parameters()) for layer in model.layers]
    if trained & (parameter_ids(trunk.parameters()) - set().union(*in_layers)):
        return []
    return [layer for layer, x in zip(model.layers, in_layers) if not x & trained]


class FrozenLayers:
    """What frozen layers returned before any trained one ran, to be returned again."""

    def __init__(self, policy: Any, reference: Any):
        # Another model has other layers.
        layers = frozen_layers(policy) if isinstance(reference, FrozenStart) else []
        self._policy, self._frozen = policy, layers
        self._outputs: list[tuple | None] = []
        self._is_common = True

    def recording(self) -> AbstractContextManager:
        """Keep what the frozen layers return, call by call."""
        if not self._frozen:
            return nullcontext()
        frozen = {id(layer) for layer in self._frozen}
        trained = [x for x in self._policy.layers if id(x) not in frozen]
        return calls_replaced(
            [
                (find_trunk(self._policy), self._begin),
                *((layer, self._record) for layer in self._frozen),
                *((layer, self._run_trained) for layer in trained),
            ]
        )

    def _begin(self, trunk, *args, **kwargs):
        self._is_common = True
        return trunk(*args, **kwargs)

    def _run_trained(self, layer, *args, **kwargs):
        # What follows differs, also a frozen layer that a model runs once more.
        self._is_common = False
        return layer(*args, **kwargs)

    def _record(self, layer, *args, **kwargs):
        result, kept = layer(*args, **kwargs), None
        if self._is_common:
            kept = result, [cache.arrays for cache in leaves([args, kwargs])]
        self._outputs.append(kept)
        return result

    def replaying(self) -> AbstractContextManager:
        """Return what was kept, in the same order of calls."""
        replay = partial(_replay, iter(self._outputs))
        return calls_replaced((layer, replay) for layer in self._frozen)


def _replay(outputs, layer, *args, **kwargs):
    if (kept := next(outputs)) is None:
        return layer(*args, **kwargs)
    result, arrays = kept
    # Layers above may share this one's keys and values.
    for cache, values in zip(leaves([args, kwargs]), arrays):
        cache.arrays = values
    return result


COMMON.append(FrozenLayers)
