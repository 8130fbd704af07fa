# Copyright © 2026 MLX Contributors

import mlx.core as mx
import mlx.nn as nn


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of a key: a recompute drops the same."""

    def __init__(self, p: float):
        super().__init__()
        self._keep = 1 - p
        self._key = mx.random.key(0)

    def set_key(self, key: mx.array) -> None:
        self._key = key

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training or self._keep == 1:
            return x
        self._key, key = mx.random.split(self._key)
        mask = mx.random.bernoulli(self._keep, x.shape, key=key)
        return (mask * x) * (1 / self._keep)
