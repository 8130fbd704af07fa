# Copyright © 2026 MLX Contributors

"""Ranks that begin together, with the same settings and inputs, or not at all."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from ..digest import digest
from ..errors import InputError
from ..features import Feature, features
from ..run.loop import TrainingStopped
from ..terminal import resuming

MOST_INPUTS = 254
# Whether this rank has told that it is ready, and whether all have.
_started: list[bool] = []
_together: list[bool] = []


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


def agree(args: SimpleNamespace, loaded: Callable[[], Mapping[str, Any]]) -> None:
    """Wait for all ranks, and refuse any that has other settings or inputs."""
    # It asks all features for theirs, this one too.
    from .table import names

    settings = {name: getattr(args, name) for name in names(per_rank=False)}
    start_together(inputs=lambda: {**settings, **loaded()})


def is_lost_rank(error: BaseException) -> bool:
    """Tell whether an error is the end of another rank."""
    text = str(error)
    broken = ("[ring]", "[nccl]", "[jaccl]")
    return isinstance(error, RuntimeError) and text.lower().startswith(broken)


class _Together(Feature):
    """No rank begins before all can, or waits for one that has ended."""

    def agree(self, job: Any) -> None:
        def loaded():
            found: dict[str, Any] = {}
            for feature in features():
                found |= feature.inputs(job)
            return found

        agree(job.args, loaded)

    def failed(self, error: Exception, args: Any) -> Exception | None:
        if not is_lost_rank(error):
            # Ranks that are ready wait for this one, whatever happened to it.
            return error if start_together(failed=True) else None
        text = "Rank lost: another process of this run has ended."
        if not _together:
            text += " Nothing was trained."
        elif args is not None and (args.train or args.resume):
            text += f" Go on with: {resuming(args.resume or args.adapter_path)}"
        return TrainingStopped(text)


FEATURE = _Together()
