# Copyright © 2026 MLX Contributors

"""Rows of several sequences, each of which attends to itself alone."""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from ...models.base import create_causal_mask
from ...models.cache import CacheList, KVCache, RotatingKVCache, make_prompt_cache
from ..features import Feature
from ..setting import Setting
from .caches import PromptKeysValues
from .parts import trunk_states
from .states import STATES


class PackedKeysValues(PromptKeysValues):
    """Keys and values of rows that hold several sequences."""

    def __init__(self, segments: mx.array, window: int | None = None, offset: int = 0):
        super().__init__(window)
        self.segments, self.offset = segments, offset

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Which tokens of its own sequence each token attends to."""
        same = self.segments[:, None, :, None] == self.segments[:, None, None, :]
        return same & create_causal_mask(N, window_size=window_size or self.window)


def _packed_cache(cache, segments, offset):
    if isinstance(cache, CacheList):
        return CacheList(*(_packed_cache(c, segments, offset) for c in cache.caches))
    # Chunked attention counts from the row's start, a recurrent state goes on.
    if not isinstance(cache, (KVCache, RotatingKVCache)):
        raise TypeError(f"Rows can't be packed for a {type(cache).__name__}.")
    window = cache.max_size if isinstance(cache, RotatingKVCache) else None
    return PackedKeysValues(segments, window, offset)


def packed_states(model: Any, batch: dict[str, Any]) -> mx.array:
    """Hidden states of packed rows."""
    segments, offset = batch["segments"], batch.get("offset", 0)
    caches = [_packed_cache(c, segments, offset) for c in make_prompt_cache(model)]
    return trunk_states(model, batch["inputs"], caches)


STATES["segments"] = packed_states


class _Packing(Feature):
    def settings(self) -> dict[str, Iterable[Setting]]:
        what = "Put several sequences in a row, instead of sharing prompts."
        return {"What to do": [Setting("pack", False, what)]}


FEATURE = _Packing()
