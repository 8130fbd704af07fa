# Copyright © 2026 MLX Contributors

"""Caches of ours, which models take where they take their own for generation.

Nothing is written in place, so gradients flow from rows back into their prompt.
"""

from typing import Any

import mlx.core as mx

from ...models.base import create_causal_mask
from ...models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from .parts import leaves


def copied(x: Any) -> Any:
    """A copy of an array: models count some down in place."""
    return mx.array(x) if isinstance(x, mx.array) else x


class _Recomputable:
    """What gradient checkpointing needs of a cache: going back in time."""

    _fixed: tuple[str, ...] = ()

    def saved(self) -> dict:
        """All but the arrays that carry gradients, to be given to ``restore``."""
        return {name: copied(getattr(self, name)) for name in self._fixed}

    def restore(self, state: dict, arrays: list) -> None:
        """Go back to where a layer's call began."""
        for name, value in state.items():
            setattr(self, name, copied(value))
        self.arrays = list(arrays)


class PromptKeysValues(_Recomputable):
    """Keys and values of the prompts, fetched by both rows of each pair."""

    _fixed = ("forked", "offset")

    def __init__(self, window: int | None = None):
        self.window = self.max_size = window
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        # What other layers may fetch, after this one updated it.
        self._fetched: list[mx.array | None] = [None, None]
        self.forked = False
        self.offset: int | mx.array = 0
        # Chunked attention may forget what lies before; training never does.
        self.start_position = 0
        self._width = 0

    @property
    def arrays(self) -> list[mx.array | None]:
        """Keys and values of the prompts, and what was fetched last."""
        return [self.keys, self.values, *self._fetched]

    @arrays.setter
    def arrays(self, arrays: list[mx.array | None]) -> None:
        self.keys, self.values, *self._fetched = arrays

    def maybe_trim_front(self) -> None:
        """Forget nothing."""

    def fork(self, width: int, lengths: mx.array | None) -> None:
        """Turn from the prompts to the rows, two for each prompt."""
        self.forked, self._width, self.offset = True, width, width
        cut = lambda x: x if x is None or x.shape[2] == width else x[:, :, :width]
        self.keys, self.values = cut(self.keys), cut(self.values)
        if lengths is not None:
            self.offset = mx.concatenate([lengths, lengths])

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Remember a prompt's keys and values, or put them before those of the rows."""
        if not self.forked:
            self.keys, self.values = self._fetched = [keys, values]
            return keys, values
        self._fetched = [
            mx.concatenate([mx.concatenate([old, old]), new], axis=2)
            for old, new in ((self.keys, keys), (self.values, values))
        ]
        return self.keys_and_values()

    def keys_and_values(self) -> tuple:
        """What the layer that owns this cache fetched, for layers that share it."""
        return tuple(self._fetched)

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Which tokens each of the next ``N`` attends to."""
        window, before = window_size or self.window, self._width
        if isinstance(self.offset, mx.array):
            return self._ragged_mask(N, window)
        if return_array or (window and before + N > window):
            return create_causal_mask(N, before, window_size=window)
        return "causal" if N > 1 else None

    def _ragged_mask(self, N, window):
        ends = self.offset[:, None, None, None]
        slots = mx.arange(self._width + N)
        steps = mx.arange(N)[:, None]
        is_prompt = slots < self._width
        mask = mx.where(is_prompt, slots < ends, slots - self._width <= steps)
        if window:
            positions = mx.where(is_prompt, slots, slots - self._width + ends)
            mask = mask & (ends + steps < positions + window)
        return mask


class PromptState(_Recomputable, ArraysCache):
    """The recurrent state after the prompts, handed to both rows of each pair."""

    _fixed = ("forked", "lengths")

    def __init__(self, size: int):
        super().__init__(size)
        self.forked = False

    @property
    def arrays(self) -> list[mx.array | None]:
        return self.cache

    @arrays.setter
    def arrays(self, arrays: list[mx.array | None]) -> None:
        self.cache = arrays

    def fork(self, width: int, lengths: mx.array | None) -> None:
        """Turn from the prompts to the rows, two for each prompt."""
        self.forked, self.lengths = True, None
        double = lambda x: None if x is None else mx.concatenate([x, x])
        self.cache = [double(x) for x in self.cache]


def _own_cache(cache):
    if isinstance(cache, CacheList):
        return CacheList(*(_own_cache(c) for c in cache.caches))
    if type(cache) is ArraysCache:
        return PromptState(len(cache.cache))
    if isinstance(cache, RotatingKVCache):
        return PromptKeysValues(cache.max_size)
    if isinstance(cache, (KVCache, ChunkedKVCache)):
        return PromptKeysValues()
    raise TypeError(f"Prompts can't be shared through a {type(cache).__name__}.")


def prompt_caches(model: Any, lengths: mx.array | None = None) -> list:
    """One cache of ours for each that the model makes for generation."""
    caches = [_own_cache(cache) for cache in make_prompt_cache(model)]
    for cache in leaves(caches):
        if isinstance(cache, PromptState) and lengths is not None:
            # Models count it down in place: each cache needs its own.
            cache.lengths = copied(lengths)
    return caches
