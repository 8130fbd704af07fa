# Copyright © 2026 MLX Contributors

"""What the ranks of a run tell each other, in the same order on all of them."""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_unflatten

from .digest import digest
from .errors import InputError

MESSAGE_BYTES = 32 * 1024**2
MOST_INPUTS = 254
# Whether this rank has told that it is ready, and whether all have.
_started: list[bool] = []
_together: list[bool] = []


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


def _ends(sizes):
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
    parts = mx.split(total, _ends([arrays[k].size for k in names]))
    sums = {k: part.reshape(arrays[k].shape) for k, part in zip(names, parts)}
    mx.eval(sums)
    return sums


def wait_for_all() -> None:
    """Wait until every rank got here; one that leaves earlier ends the others."""
    if mx.distributed.init().size() > 1:
        mx.eval(mx.distributed.all_sum(mx.array(1.0)))


def start_together(
    failed: bool = False, inputs: Callable[[], Mapping[str, Any]] = dict
) -> bool:
    """Wait before the first step until all ranks got as far, or one can't."""
    world = mx.distributed.init()
    if _started or world.size() == 1:
        return failed
    _started.append(True)
    given = {} if failed else inputs()
    names = sorted(given)
    # Of one length, whatever a rank knows: another one's version may know more.
    row = [int(failed), _word(names), *(_word(given[name]) for name in names)]
    row += [0] * (MOST_INPUTS + 2 - len(row))
    try:
        rows = mx.array([row], dtype=mx.uint32)
        rows = mx.distributed.all_gather(rows, group=world).tolist()
    except RuntimeError:
        if not failed:
            raise
        return True
    flags = [flag for flag, *_ in rows]
    if failed:
        return flags.index(1) == world.rank()
    others = [i for i, other in enumerate(rows) if other != rows[0]]
    if any(flags) or others and world.rank() > 0:
        raise SystemExit(2)
    if others:
        _refuse(names, rows, others)
    _together.append(True)
    return False


def are_together() -> bool:
    """Tell whether all ranks have got as far as the first step."""
    return bool(_together)


def _word(value):
    return int(digest(value, size=4), 16)


def _refuse(names, rows, others):
    """Name the ranks that would take part in another run, and what differs."""
    first, versions = rows[0][2:], {rows[i][1] for i in others}
    kinds = [
        name
        for k, name in enumerate(names)
        if any(first[k] != rows[i][k + 2] for i in others)
    ]
    if versions != {rows[0][1]}:
        kinds = ["its version of mlx_lm"]
    who = ", ".join(map(str, others))
    raise InputError(
        f"Rank {who} differs from rank 0 in {', '.join(kinds)}: give all ranks the same "
        "settings, and copy model, data and the folder to resume to every machine."
    )


def _with_own_rows(own, gathered, mine):
    """All ranks' rows, of which this rank's carry a gradient."""

    @mx.custom_function
    def put(own, gathered):
        return mx.concatenate([gathered[: mine.start], own, gathered[mine.stop :]])

    @put.vjp
    def put_vjp(primals, cotangent, output):
        # The gradients' message waits for this one, whatever they depend on.
        (gradient,) = mx.depends([cotangent[mine]], [primals[1]])
        return gradient, mx.zeros_like(primals[1])

    return put(own, mx.stop_gradient(gathered))


def gather_pairs(arrays: dict[str, mx.array]) -> tuple[dict[str, mx.array], slice]:
    """Put all ranks' pairs behind each other, for a loss that looks at all of them."""
    world = mx.distributed.init()
    pairs = next(iter(arrays.values())).shape[0]
    start = world.rank() * pairs
    own = slice(start, start + pairs)
    if world.size() == 1:
        return arrays, own
    names = sorted(arrays)
    rows = [arrays[k].astype(mx.float32).reshape(pairs, -1) for k in names]
    message = mx.concatenate(rows, axis=1)
    gathered = mx.distributed.all_gather(mx.stop_gradient(message), group=world)
    whole = _with_own_rows(message, gathered, own)
    columns = mx.split(whole, _ends([row.shape[1] for row in rows]), axis=1)
    shaped = [x.reshape(-1, *arrays[k].shape[1:]) for k, x in zip(names, columns)]
    return dict(zip(names, shaped)), own


def is_lost_rank(error: BaseException) -> bool:
    """Tell whether an error is the end of another rank."""
    text = str(error)
    broken = ("[ring]", "[nccl]", "[jaccl]")
    return isinstance(error, RuntimeError) and text.lower().startswith(broken)
