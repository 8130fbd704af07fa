# Copyright © 2026 MLX Contributors

"""What the ranks of a run tell each other, in the same order on all of them."""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_unflatten

from .errors import InputError

MESSAGE_BYTES = 32 * 1024**2


def join_ranks() -> mx.distributed.Group:
    """Join the ranks that the environment names; a rank is alone if it names none."""
    try:
        return mx.distributed.init()
    except RuntimeError as e:
        raise InputError(
            f"Can't join the other ranks: {e}. Start all of them with mlx.launch; for "
            "one alone, unset MLX_RANK and MLX_HOSTFILE."
        ) from e


def average_over_ranks(tree: Any) -> Any:
    """Average float32 arrays over all ranks, as part of a step."""
    if mx.distributed.init().size() == 1:
        return tree
    messages: list[list[tuple[str, mx.array]]] = [[]]
    size = 0
    for name, x in tree_flatten(tree):
        if size >= MESSAGE_BYTES:
            messages.append([])
            size = 0
        messages[-1].append((name, x))
        size += x.nbytes
    averaged: list[tuple[str, mx.array]] = []
    for message in messages:
        names, arrays = zip(*message)
        # Each waits for the last: a rank that knows the reference's numbers has
        # another graph, which alone would send in another order.
        after = [x for _, x in averaged[-1:]]
        waiting = mx.depends(list(arrays), after) if after else list(arrays)
        results = average_gradients(waiting, all_reduce_size=MESSAGE_BYTES**2)
        averaged += zip(names, results)
    return tree_unflatten(averaged)


def on_all_ranks(condition: mx.array) -> mx.array:
    """Tell whether a condition holds on every rank, as part of a step."""
    if mx.distributed.init().size() == 1:
        return condition
    failed = 1 - condition.astype(mx.float32)
    return average_over_ranks({"failed": failed})["failed"] == 0


def ends(sizes: list[int]) -> list[int]:
    """Where arrays of these sizes end in a message, but for the last."""
    return np.cumsum(sizes[:-1], dtype=int).tolist()


def sum_over_ranks(
    arrays: dict[str, mx.array], group: mx.distributed.Group | None = None
) -> dict[str, mx.array]:
    """Sum float32 arrays over ranks, in one message."""
    if not arrays:
        return {}
    names = sorted(arrays)
    message = mx.concatenate([arrays[k].reshape(-1) for k in names])
    mx.eval(message)
    # No stream is given: NCCL can't take the CPU's.
    total = mx.distributed.all_sum(message, group=group)
    mx.eval(total)
    parts = mx.split(total, ends([arrays[k].size for k in names]))
    sums = {k: part.reshape(arrays[k].shape) for k, part in zip(names, parts)}
    mx.eval(sums)
    return sums
