# Copyright © 2026 MLX Contributors

"""The settings of several finished runs, checked to agree."""

import copy
from pathlib import Path
from types import SimpleNamespace

from ..errors import InputError
from ..objective.objective import objective_of
from ..setting import check_type
from .begin import settle
from .table import names

# What decides the test set's tokens.
SAME_KEYS = tuple(names(compared=True))
_TESTED = (*SAME_KEYS, "The kind of data")


def finished_runs(args: SimpleNamespace) -> list[SimpleNamespace]:
    """The settings of each of several runs, checked against each other."""
    folders = list(args.adapter_path)
    if args.train or args.resume or args.inspect or not args.test:
        raise InputError(
            f"adapter_path names {len(folders)} folders, which only --test alone can "
            "take: leave out --train, --resume and --inspect, or name one folder."
        )
    for folder in folders:
        check_type("adapter_path", folder, str)
    if len({str(Path(folder).resolve()) for folder in folders}) < len(folders):
        raise InputError(f"adapter_path names a folder twice: {', '.join(folders)}.")
    runs = []
    for folder in folders:
        one = copy.copy(args)
        one.adapter_path = folder
        settle(one)
        runs.append(one)
    for other in runs[1:]:
        for what, ours, theirs in zip(_TESTED, _tested(runs[0]), _tested(other)):
            if ours != theirs:
                hint = " Or give it to the command." if what in SAME_KEYS[1:] else ""
                raise InputError(
                    f"{what} is {ours!r} in {runs[0].adapter_path} and {theirs!r} in "
                    f"{other.adapter_path}: compare runs that agree in it.{hint}"
                )
    return runs


def _tested(run):
    """What runs must agree in, in the order of ``_TESTED``."""
    return [*(getattr(run, key, None) for key in SAME_KEYS), objective_of(run).data]
