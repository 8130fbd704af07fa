# Copyright © 2026 MLX Contributors

"""The hidden states that predict the answers' tokens, however a batch is laid out."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import mlx.core as mx

from ..plug_ins import load
from .parts import find_trunk, trunk_states

States = Callable[[Any, dict[str, mx.array]], mx.array]
# What computes batches that are no whole rows, by the array that tells them.
STATES: dict[str, States] = {}
# What makes the caches of a model, if anything does.
CACHES: list[Callable[[Any], list]] = []


def plain_states(model: Any, batch: dict[str, mx.array]) -> mx.array:
    """Hidden states of whole rows."""
    # Families whose layers share keys and values are another function without caches.
    caches = None
    if CACHES and find_trunk(model) is not None:
        with suppress(TypeError):
            caches = CACHES[-1](model)
    return trunk_states(model, batch["inputs"], caches)


def completion_states(model: Any, batch: dict[str, mx.array]) -> mx.array:
    """The hidden states that predict the answers' tokens."""
    found = (states for array, states in STATES.items() if array in batch)
    states = next(found, plain_states)(model, batch)
    return states.reshape(-1, states.shape[-1])[batch["positions"]]


# Each fills the table.
PLUG_INS = ("shared", "packed")
load(__package__, PLUG_INS)
