# Copyright © 2026 MLX Contributors

"""Settings completed by those of earlier runs; of several, checked to agree."""

import copy
from pathlib import Path
from types import SimpleNamespace

from ..errors import InputError
from ..objective.objective import objective_of
from ..setting import check_usable
from .adopt import adopt_adapter_config, adopt_finished_run, adopt_resumed_run
from .checks import check_args, check_types
from .table import CONFIG_DEFAULTS, names

# What decides the test set's tokens.
SAME_KEYS = tuple(names(compared=True))
_TESTED = (*SAME_KEYS, "The kind of data")


def settle(args: SimpleNamespace) -> None:
    """Complete the settings by those of an earlier run, and check them."""
    check_types(vars(args))
    folder = args.resume
    if args.resume:
        adopt_resumed_run(args)
    if args.train:
        adopt_adapter_config(args)
        if args.resume_adapter_file:
            folder = folder or Path(args.resume_adapter_file).parent
    elif (args.test or args.inspect) and args.adapter_path:
        adopt_finished_run(args)
        folder = args.adapter_path
    # A full run saves null.
    given = {k: v for k, v in (args.lora_parameters or {}).items() if v is not None}
    args.lora_parameters = {**CONFIG_DEFAULTS["lora_parameters"], **given}
    try:
        check_args(args)
    except InputError as e:
        if folder is None:
            raise
        raise InputError(
            f"{e} What was not given to the command is from {folder}/adapter_config.json."
        ) from e
    if args.fine_tune_type == "full":
        args.lora_parameters = None


def finished_runs(args: SimpleNamespace) -> list[SimpleNamespace]:
    """The settings of each of several runs, checked against each other."""
    folders = list(args.adapter_path)
    if args.train or args.resume or args.inspect or not args.test:
        raise InputError(
            f"adapter_path names {len(folders)} folders, which only --test alone can "
            "take: leave out --train, --resume and --inspect, or name one folder."
        )
    check_usable("adapter_path", folders)
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
