# Copyright © 2026 MLX Contributors

"""What the ranks of a run tell each other, in the same order on all of them."""

from typing import Any

import mlx.core as mx
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_unflatten

MESSAGE_BYTES = 32 * 1024**2
_started: list[bool] = []


def average_over_ranks(tree: Any) -> Any:
    """
    Average float32 arrays over all ranks, as part of a step.

    Args:
        tree: Dicts and lists of arrays, of the same shapes on every rank.

    Returns:
        The tree of averages; the tree itself where there is one rank.

    Example:
        >>> average_over_ranks({"pairs": mx.array(2.0)})["pairs"].item()
        2.0
    """
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


def sum_over_ranks(
    arrays: dict[str, mx.array], group: mx.distributed.Group | None = None
) -> dict[str, mx.array]:
    """
    Sum arrays over ranks at once; every rank takes part, whoever needs the sums.

    Args:
        arrays (dict): Arrays by name, the same names and shapes on every rank.
        group (mx.distributed.Group, optional): The ranks. Default: all.

    Returns:
        dict: The sums, evaluated.

    Example:
        >>> sum_over_ranks({"pairs": mx.array(2.0)})["pairs"].item()
        2.0
    """
    sums = {}
    for name in sorted(arrays):
        sums[name] = mx.distributed.all_sum(arrays[name], group=group)
        mx.eval(sums[name])
    return sums


def start_together(failed: bool = False) -> bool:
    """
    Wait before the first step until all ranks got as far, or one can't.

    Only the first call talks to the others: an error during the run is one rank's.

    Args:
        failed (bool): Whether this rank can't go on. Default: ``False``.

    Returns:
        bool: Whether this rank has to say why it failed; the first that did has.

    Raises:
        SystemExit: With code 2 if only other ranks failed: they say why.

    Example:
        >>> start_together(), start_together(True)
        (False, True)
    """
    world = mx.distributed.init()
    if _started or world.size() == 1:
        return failed
    _started.append(True)
    try:
        flags = mx.distributed.all_gather(mx.array([int(failed)]), group=world)
        flags = flags.tolist()
    except RuntimeError:
        if not failed:
            raise
        return True
    if any(flags) and not failed:
        raise SystemExit(2)
    return failed and flags.index(1) == world.rank()


def is_lost_rank(error: BaseException) -> bool:
    """
    Tell whether an error is the end of another rank.

    Args:
        error (BaseException): What MLX raised.

    Returns:
        bool: True for a connection that broke.

    Example:
        >>> is_lost_rank(RuntimeError("[ring] connection to a peer was lost"))
        True
    """
    text = str(error)
    broken = ("[ring]", "[nccl]", "[jaccl]")
    return isinstance(error, RuntimeError) and text.lower().startswith(broken)
