# Copyright © 2026 MLX Contributors

"""The settings of a preference run: checked, fitted to the model, saved."""

import difflib
from collections.abc import Iterable
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn

from ..data.options import RowOptions
from ..errors import InputError
from ..features import features
from ..files import check_writable
from ..objective.objective import objective_of
from ..policy.model import LEARNING_RATES, most_positions
from ..policy.optimizer import OPTIMIZERS, build_learning_rate, build_optimizer
from ..setting import check_type, check_usable
from ..terminal import rprint
from .table import LORA_KEYS, SETTINGS

# More than any layer is wide.
MOST_RANK = 2**20


def check_keys(
    config: Iterable[str], known: Iterable[str], where: str = "the config"
) -> None:
    """Refuse a misspelt key."""
    for key in (k for k in config if k not in known):
        close = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.5)
        hint = f", did you mean {close[0]!r}?" if close else ". See DPO_REFERENCE.md."
        raise InputError(f"Unknown key {key!r} in {where}{hint}")


def check_types(config: dict) -> None:
    """Refuse values of the wrong type, which a YAML file may hold."""
    for key, value in config.items():
        if key in SETTINGS:
            SETTINGS[key].check_type(value)
            check_usable(key, value)


def check_args(args: SimpleNamespace) -> None:
    """Check every setting that can be checked before anything is loaded."""
    if not (args.train or args.test or (args.inspect and args.adapter_path)):
        raise InputError("Must provide at least one of --train or --test")
    if not args.data and not args.hf_dataset:
        raise InputError("No data: give --data a folder or a Hugging Face dataset.")
    if args.train and not args.adapter_path:
        raise InputError("adapter_path is empty: name a folder for the adapter.")
    world = mx.distributed.init()
    if args.train and world.rank() == 0:
        check_writable(args.adapter_path, "adapter_path")
    args.optimizer = args.optimizer.lower()
    for key, one in SETTINGS.items():
        one.check(getattr(args, key))
    if args.batch_size % world.size():
        raise InputError(
            f"batch_size is {args.batch_size}, which {world.size()} processes can't "
            "share evenly: give a multiple of it."
        )
    _check_objective(args)
    _check_nested(args)
    for feature in features():
        feature.check(args)
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES[args.fine_tune_type]
    args.learning_rate = float(args.learning_rate)
    # Builds it once to find mistakes; the length of the run comes later.
    build_learning_rate(args.learning_rate, 1, args.lr_schedule, args.warmup_steps)
    build_optimizer(args.optimizer, args.learning_rate, args.optimizer_config)


def _check_objective(args):
    """The losses, and what data, batches and reference have to do with them."""
    objective = objective_of(args)
    losses = " and ".join(objective.losses)
    if args.margin_feature and not objective.takes_margins:
        raise InputError(
            f"margin_feature does not go with {losses}: no score has to be ahead of "
            "another one."
        )
    if args.weight_feature and objective.least_batch > 1 and objective.data == "pairs":
        raise InputError(
            f"weight_feature does not go with {losses}, which compares whole batches."
        )
    if args.train and args.batch_size < objective.least_batch:
        raise InputError(
            f"{losses} compares the answers of a batch: batch_size must be at least "
            f"{objective.least_batch}, got {args.batch_size}."
        )
    if objective.data != "pairs":
        # Those of single datasets are looked at when they are read.
        for name, what in ((args.criteria, "criteria"), (args.inspect, "inspect")):
            if name is not None:
                raise InputError(
                    f"{what} is for pairs of answers, and {losses} has "
                    f"{objective.data}: leave it out."
                )


def _check_nested(args):
    check_keys(args.optimizer_config, OPTIMIZERS, "optimizer_config")
    RowOptions().updated(vars(args))
    lora = args.lora_parameters
    # Those of an adapter may have more keys.
    if "lora_parameters" in args.explicit:
        check_keys(lora, LORA_KEYS, "lora_parameters")
    for key, value in lora.items():
        if value is not None and (default := LORA_KEYS.get(key)) is not None:
            check_type(f"lora_parameters.{key}", value, type(default))
    if not isinstance(lora.get("keys") or [], list):
        raise InputError(f"lora_parameters.keys must be a list, got {lora['keys']!r}.")
    if not 1 <= lora["rank"] <= MOST_RANK or not 0 <= lora["dropout"] < 1:
        raise InputError(
            f"lora_parameters needs a rank of at least 1 and at most {MOST_RANK:,} and "
            f"a dropout of at least 0 and below 1, got {lora}."
        )


def fit_to_model(args: SimpleNamespace, model: nn.Module) -> None:
    """Clamp defaults to what the model has and refuse explicit ones beyond it."""
    limits = {"num_layers": len(model.layers), "max_seq_length": most_positions(model)}
    for key, limit in limits.items():
        if limit is None or getattr(args, key) <= limit:
            continue
        if key in args.explicit:
            what = "layers" if key == "num_layers" else "positions"
            raise InputError(
                f"{key} is {getattr(args, key)} but the model only has {limit} {what}: "
                "lower it, or leave it out."
            )
        if key == "max_seq_length":
            rprint(f"max_seq_length is {limit}, the most positions the model has.")
        setattr(args, key, limit)
