# Copyright © 2026 MLX Contributors

"""The settings of a preference run: checked, fitted to the model, saved."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn

from ...cli_ui import rprint
from ..data.rankings import check_criteria
from ..errors import InputError
from ..files import check_writable
from ..measure.metrics import BEST
from ..objective.objective import objective_of
from ..policy.optimizer import OPTIMIZERS, build_learning_rate, build_optimizer
from ..run.folder import METRICS
from ..watch import retained_text
from ..watch.samples import read_prompts
from ..watch.trackers import SERVICES, check_matplotlib, missing_tracker


def check_watchers(args: SimpleNamespace) -> None:
    """Check the settings of samples, ordinary text and report before anything loads."""
    if args.sample_prompts is not None:
        read_prompts(args.sample_prompts)
    if args.retain_data is not None:
        retained_text.read_text(args.retain_data)
    if args.report:
        check_matplotlib()
        if not args.adapter_path:
            raise InputError("report needs adapter_path: it is written there.")
        if not args.train and not (Path(args.adapter_path) / METRICS).exists():
            raise InputError(
                f"report shows a run, but {args.adapter_path} has no {METRICS}. Leave "
                "it out, or give --adapter-path the folder of a run."
            )


LEARNING_RATES = {"lora": 1e-5, "dora": 1e-5, "full": 1e-6}
POSITIVE_KEYS = (
    "batch_size",
    "iters",
    "epochs",
    "max_seq_length",
    "grad_accumulation_steps",
    "steps_per_report",
    "steps_per_eval",
    "save_every",
    "keep_checkpoints",
    "max_skipped_steps",
    "inspect",
    "sample_tokens",
    "sync_steps",
)
LORA_KEYS = ("rank", "scale", "dropout", "keys")
HF_DATASET_KEYS = (
    "path",
    "config",
    "data_dir",
    "train_split",
    "valid_split",
    "test_split",
    "prompt_feature",
    "chosen_feature",
    "rejected_feature",
    "completion_feature",
    "text_feature",
    "chat_feature",
    "mask_prompt",
    "wrap_text",
    "transcripts",
    "max_bad_rows",
    "weight_feature",
    "margin_feature",
    "criteria",
)
# The type of settings whose default is None; that of others is their default's.
UNSET_TYPES: dict[str, type] = {
    "clear_cache_threshold": int,
    "epochs": int,
    "warmup_steps": int,
    "learning_rate": float,
    "data": str,
    "data_dir": str,
    "reference_model": str,
    "resume_adapter_file": str,
    "report_to": str,
    "project_name": str,
    "resume": str,
    "keep_checkpoints": int,
    "save_best": str,
    "inspect": int,
    "retain_data": str,
    "weight_feature": str,
    "margin_feature": str,
    "criteria": dict,
}
_KINDS: dict[type, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("text", (str,)),
    dict: ("a mapping", (dict,)),
}
_NUMBER = re.compile(r"[-+]?[\d.]+([eE][-+]?\d+)?")


def check_keys(config: dict, known: Iterable[str], where: str = "the config") -> None:
    """Refuse a misspelt key."""
    for key in config:
        if key not in known:
            close = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.5)
            hint = f", did you mean {close[0]!r}?" if close else ". See DPO.md."
            raise InputError(f"Unknown key {key!r} in {where}{hint}")


def check_types(config: dict, defaults: dict) -> None:
    """Refuse values of the wrong type, which a YAML file may hold."""
    for key, value in config.items():
        default = defaults.get(key)
        wanted = UNSET_TYPES.get(key) if default is None else type(default)
        if value is None or wanted not in _KINDS:
            continue
        if key == "loss_type" and isinstance(value, list):
            continue  # Objective looks at it.
        kind, types = _KINDS[wanted]
        is_bool = isinstance(value, bool) and wanted is not bool
        if is_bool or not isinstance(value, types):
            quoted = isinstance(value, str) and _NUMBER.fullmatch(value.strip())
            hint = ": in YAML without quotes" if quoted else ""
            raise InputError(f"{key} must be {kind}, got {value!r}{hint}.")


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
    _check_objective(args)
    if args.fine_tune_type not in LEARNING_RATES:
        raise InputError(
            f"Unknown fine_tune_type {args.fine_tune_type!r}, choose from "
            f"{', '.join(LEARNING_RATES)}."
        )
    if args.train_head and args.fine_tune_type != "full":
        raise InputError(
            "train_head needs fine_tune_type full: no loader takes a whole head beside "
            f"{args.fine_tune_type}. Name it in lora_parameters.keys to adapt it."
        )
    args.optimizer = args.optimizer.lower()
    if args.optimizer not in OPTIMIZERS:
        raise InputError(
            f"Unknown optimizer {args.optimizer!r}, choose from {', '.join(OPTIMIZERS)}."
        )
    _check_numbers(args, world.size())
    if args.save_best not in (None, *BEST):
        raise InputError(
            f"Unknown save_best {args.save_best!r}, choose from {', '.join(BEST)}."
        )
    for key in ("reference_cache", "token_cache"):
        value = getattr(args, key)
        if value is not None and value is not False and not isinstance(value, str):
            raise InputError(f"{key} must be a folder or false, got {value!r}.")
    _check_nested(args)
    check_watchers(args)
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES[args.fine_tune_type]
    # Builds it once to find mistakes; the length of the run comes later.
    build_learning_rate(args.learning_rate, 1, args.lr_schedule, args.warmup_steps)
    build_optimizer(args.optimizer, args.learning_rate, args.optimizer_config)


def _check_numbers(args, ranks):
    for key in POSITIVE_KEYS:
        value = getattr(args, key)
        if value is not None and value < 1:
            raise InputError(f"{key} must be at least 1, got {value}.")
    if args.batch_size % ranks:
        raise InputError(
            f"batch_size is {args.batch_size}, which {ranks} processes can't "
            "share evenly: give a multiple of it."
        )
    for key in ("num_layers", "val_batches", "test_batches"):
        value = getattr(args, key)
        if value < 1 and value != -1:
            raise InputError(f"{key} must be -1 (all) or at least 1, got {value}.")
    for key in ("learning_rate", "max_grad_norm", "warmup_steps", "seed"):
        value = getattr(args, key)
        if value is not None and not value >= 0:
            raise InputError(f"{key} must not be negative, got {value}.")


def _check_objective(args):
    """The losses, and what data, batches and reference have to do with them."""
    objective = objective_of(args)
    names = " and ".join(objective.losses)
    if args.margin_feature and not objective.takes_margins:
        raise InputError(
            f"margin_feature does not go with {names}: no score has to be ahead of "
            "another one."
        )
    if args.weight_feature and objective.least_batch > 1 and objective.data == "pairs":
        raise InputError(
            f"weight_feature does not go with {names}, which compares whole batches."
        )
    if args.train and args.batch_size < objective.least_batch:
        raise InputError(
            f"{names} compares the answers of a batch: batch_size must be at least "
            f"{objective.least_batch}, got {args.batch_size}."
        )
    if objective.data != "pairs":
        # Those of single datasets are looked at when they are read.
        for name, what in ((args.criteria, "criteria"), (args.inspect, "inspect")):
            if name is not None:
                raise InputError(
                    f"{what} is for pairs of answers, and {names} has "
                    f"{objective.data}: leave it out."
                )
    if args.reference_model and not objective.needs_reference:
        raise InputError(f"{names} has no reference: leave out reference_model.")
    if not 0 < args.sync_alpha <= 1:
        raise InputError(
            f"sync_alpha must be above 0 and at most 1, got {args.sync_alpha}."
        )
    if args.sync_reference and not objective.needs_reference:
        raise InputError(f"{names} has no reference: leave out sync_reference.")
    if args.sync_reference and args.reference_model:
        raise InputError(
            "sync_reference lets the policy's own start follow it: leave out "
            "reference_model."
        )
    if not args.sync_reference and args.explicit & {"sync_alpha", "sync_steps"}:
        raise InputError("sync_alpha and sync_steps need sync_reference.")


def _check_nested(args):
    check_keys(args.optimizer_config, OPTIMIZERS, "optimizer_config")
    given = args.hf_dataset or []
    if not isinstance(given, (dict, list)):
        raise InputError(f"hf_dataset must be a mapping or a list, got {given!r}.")
    for dataset in [given] if isinstance(given, dict) else given:
        if isinstance(dataset, dict):
            check_keys(dataset, HF_DATASET_KEYS, "hf_dataset")
            check_criteria(dataset.get("criteria"))
    check_criteria(args.criteria)
    lora = args.lora_parameters
    # Those of an adapter may have more keys.
    if "lora_parameters" in args.explicit:
        check_keys(lora, LORA_KEYS, "lora_parameters")
    check_types(
        {f"lora_parameters.{k}": v for k, v in lora.items()},
        {
            "lora_parameters.rank": 8,
            "lora_parameters.scale": 20.0,
            "lora_parameters.dropout": 0.0,
        },
    )
    if not isinstance(lora.get("keys") or [], list):
        raise InputError(f"lora_parameters.keys must be a list, got {lora['keys']!r}.")
    if lora["rank"] < 1 or not 0 <= lora["dropout"] < 1:
        raise InputError(
            "lora_parameters needs a rank of at least 1 and a dropout of at least 0 "
            f"and below 1, got {lora}."
        )
    names = [name.strip().lower() for name in (args.report_to or "").split(",")]
    for name in filter(None, names):
        if name not in SERVICES:
            raise InputError(
                f"Unknown report_to {name!r}, choose from " f"{', '.join(SERVICES)}."
            )
        if missing := missing_tracker(name):
            raise InputError(f"report_to needs {missing}: pip install {missing}")


def fit_to_model(args: SimpleNamespace, model: nn.Module) -> None:
    """Clamp defaults to what the model has and refuse explicit ones beyond it."""
    limits = {"num_layers": len(model.layers), "max_seq_length": None}
    config = vars(getattr(model, "args", SimpleNamespace()))
    text = config.get("text_config") or {}
    config = {**(text if isinstance(text, dict) else vars(text)), **config}
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        if isinstance(positions := config.get(name), int):
            limits["max_seq_length"] = positions
            break
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
