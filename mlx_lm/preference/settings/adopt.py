# Copyright © 2026 MLX Contributors

from pathlib import Path
from types import SimpleNamespace

from ..errors import InputError
from ..policy.adapter import OTHERS, adapter_config, adapter_file
from ..run.folder import TRAINED_WITH
from ..terminal import rprint
from .table import SETTINGS, names

TRUST = "trust_remote_code"
# What is meant for one command is not taken from the run before.
OWN = ("resume", "resume_anyway", "restart", "dry_run", TRUST)


def adopt_adapter_config(args: SimpleNamespace) -> None:
    """Take rank, keys and layers from the adapter that the run starts from."""
    if args.resume_adapter_file is None:
        return
    path = adapter_file(args.resume_adapter_file)
    if not path.exists():
        raise InputError(f"resume_adapter_file {path} does not exist.")
    if path.parent.resolve() == Path(args.adapter_path).resolve():
        raise InputError(
            f"adapter_path {args.adapter_path} holds the adapter to start from, which "
            "the run would overwrite: choose another folder."
        )
    args.resume_adapter_file = str(path)
    config = adapter_config(path)
    theirs = (other.shape(path, config) for other in OTHERS)
    config = next(filter(None, theirs), config)
    if config is None:
        rprint(
            f"[WARNING] {path} has no adapter_config.json beside it: its rank, scale "
            "and layers are taken to be this run's."
        )
        return
    if config.get("trained_with") == TRAINED_WITH and not args.new_reference:
        raise InputError(
            f"{path} was written by a DPO run, whose reference is not this adapter. "
            "Continue that run with --resume, or set new_reference: true to start a "
            "new one whose reference is this adapter."
        )
    # A run that goes on has its settings already, dropout among them.
    if not args.resume:
        _adopt(args, config, path)


def _checked(config, where, keys):
    """What a configuration has of some settings, each of the type that it must have."""
    where = where if where.is_dir() else where.parent
    found = {k: config[k] for k in keys if config.get(k) is not None}
    for key, value in found.items():
        try:
            SETTINGS[key].check(value)
        except InputError as e:
            raise InputError(f"{where / 'adapter_config.json'}: {e}") from e
    # Nobody lets code run but who gives this command.
    return _without_trust(found)


def _without_trust(value):
    if isinstance(value, dict):
        known = {k: v for k, v in value.items() if k != TRUST}
        return {k: _without_trust(v) for k, v in known.items()}
    return [*map(_without_trust, value)] if isinstance(value, list) else value


def _say(taken, folder):
    """Say what a folder's settings make the command read, write or send elsewhere."""
    said = [f"{k} {v!r}" for k, v in taken.items() if SETTINGS[k].outside]
    if said:
        rprint(f"Taken from {folder}: {', '.join(said)}.")


def _adopt(args, config, path):
    """Take the adapter's shape from its configuration, or say what contradicts."""
    theirs = _checked(config, Path(path), names(resume="shape", tested=True))
    ours = {k: getattr(args, k) for k in theirs if k in args.explicit}
    if "lora_parameters" in ours:
        parameters = dict(theirs["lora_parameters"])
        given = ours.pop("lora_parameters")
        # Dropout is no part of what the adapter computes.
        parameters["dropout"] = given.get("dropout", parameters.get("dropout", 0.0))
        theirs["lora_parameters"] = parameters
        ours |= {f"lora_parameters.{k}": v for k, v in given.items()}
    for key, value in ours.items():
        parent, _, name = key.partition(".")
        other = theirs[parent].get(name) if name else theirs[parent]
        if value != other:
            raise InputError(
                f"{key} is {value} but the adapter {path} was trained with {other}. "
                f"Leave {key} out, the adapter decides it."
            )
    for key, value in theirs.items():
        setattr(args, key, value)


def adopt_finished_run(args: SimpleNamespace) -> None:
    """Take the settings of a finished run that decide the numbers of its test."""
    config = adapter_config(args.adapter_path)
    if config is None:
        raise InputError(
            f"{args.adapter_path} has no adapter_config.json. Give --adapter-path the "
            "folder of a run, or '' to test the model as it is."
        )
    _adopt(args, config, args.adapter_path)
    found = _checked(config, Path(args.adapter_path), names(tested=True))
    taken = {k: v for k, v in found.items() if k not in args.explicit}
    for key, value in taken.items():
        setattr(args, key, value)
    _say(taken, args.adapter_path)


def adopt_resumed_run(args: SimpleNamespace) -> None:
    """Take all settings from the run that goes on."""
    folder = str(args.resume)
    config = adapter_config(folder) if Path(folder).is_dir() else None
    if config is None or config.get("trained_with") != TRAINED_WITH:
        raise InputError(
            f"Nothing to resume in {folder}: it has no adapter_config.json of a "
            "mlx_lm.dpo run."
        )
    known = [key for key in config if key in SETTINGS and key not in OWN]
    found = _checked(config, Path(folder), known)
    _say({k: v for k, v in found.items() if k not in args.explicit}, folder)
    for key in known:
        new, old = getattr(args, key), found.get(key)
        # The folder may have been renamed.
        old = folder if key == "adapter_path" else old
        if key not in args.explicit or _means(key, new, old):
            setattr(args, key, SETTINGS[key].default if old is None else old)
        elif SETTINGS[key].resume != "free":
            _refuse(f"{key} is {new!r}", repr(old), key, args)
    if "iters" in args.explicit:
        args.epochs = None
    if config.get("loss_weights") and args.loss_type != config.get("loss_type"):
        # Those were for the losses before.
        if "loss_weights" not in args.explicit:
            args.loss_weights = None
    args.train, args.adapter_path = True, folder


def _means(key, new, old):
    """Whether a setting, as the user writes it, is what was saved."""
    if key == "optimizer":
        return new.lower() == old
    if key == "lora_parameters":
        return old is None or all(old.get(k) == v for k, v in new.items())
    if key == "resume_adapter_file" and old is not None:
        return Path(old) in (Path(new), adapter_file(new))
    if key == "adapter_path":
        return Path(new).resolve() == Path(old).resolve()
    return new == old


def _refuse(what, before, key, args):
    if SETTINGS[key].resume == "shape":
        raise InputError(
            f"{what}, but the run in {args.resume} was started with {before}, and what "
            "it saved has that shape. Leave it out, or start a new run."
        )
    if not args.resume_anyway:
        raise InputError(
            f"{what}, but the run in {args.resume} was started with {before}. Leave it "
            "out, or give --resume-anyway to go on all the same."
        )
    rprint(f"[WARNING] {what}, no longer {before}.")
