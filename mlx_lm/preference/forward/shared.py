# Copyright © 2026 MLX Contributors

"""Each prompt once: chosen and rejected go on from its keys, values and states."""

from typing import Any

import mlx.core as mx

from .caches import prompt_caches
from .parts import leaves, trunk_states
from .states import CACHES, STATES


def shared_states(model: Any, batch: dict[str, mx.array]) -> mx.array:
    """Hidden states of the rows, each prompt computed once."""
    lengths = batch.get("prompt_lengths")
    caches = prompt_caches(model, lengths)
    trunk_states(model, batch["prompts"], caches)
    # One number where the prompts are as long as each other, but padded.
    width, shared = batch["prompts"].shape[1], batch.get("shared")
    for cache in leaves(caches):
        cache.fork(shared or width, None if shared else lengths)
    return trunk_states(model, batch["inputs"], caches)


STATES["prompts"] = shared_states
CACHES.append(prompt_caches)
