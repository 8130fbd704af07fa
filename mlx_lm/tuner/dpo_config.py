# Copyright © 2026 MLX Contributors

"""The settings of a preference run: checked, fitted to the model, saved."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import mlx.nn as nn
import mlx.optimizers as optim

from .losses import check_loss_options
from .policy import TRAINED_WITH
from .schedules import build_learning_rate
from .trainer import DPOTrainingArgs

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
)
OPTIMIZERS = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}


def check_keys(config: dict, known: Iterable[str]) -> None:
    """
    Refuse a misspelt key.

    Args:
        config (dict): Settings as read from a YAML file.
        known (Iterable): The keys that exist.

    Raises:
        ValueError: If a key is unknown; the message names the closest known one.

    Example:
        >>> check_keys({"betta": 0.1}, ["beta"])
        Traceback (most recent call last):
        ...
        ValueError: Unknown key 'betta' in the config, did you mean 'beta'?
    """
    for key in config:
        if key not in known:
            close = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.5)
            hint = f", did you mean {close[0]!r}?" if close else ". See DPO.md."
            raise ValueError(f"Unknown key {key!r} in the config{hint}")


def check_args(args: SimpleNamespace) -> None:
    """
    Check every setting that can be checked before anything is loaded.

    Args:
        args (SimpleNamespace): What ``resolve_args`` returned. Values that
            depend on others are filled in: optimizer's lower case, learning rate.

    Raises:
        ValueError: If a setting is missing or out of range.

    Example:
        >>> from mlx_lm.dpo import resolve_args
        >>> args = resolve_args(["--train", "--data", "d", "--optimizer", "adamw"])
        >>> check_args(args)
        >>> args.learning_rate
        1e-05
    """
    if not (args.train or args.test):
        raise ValueError("Must provide at least one of --train or --test")
    if not args.data and not args.hf_dataset:
        raise ValueError("No data: give --data a folder or a Hugging Face dataset.")
    check_loss_options(args.beta, args.label_smoothing, args.loss_type)
    if args.fine_tune_type not in LEARNING_RATES:
        raise ValueError(
            f"Unknown fine_tune_type {args.fine_tune_type!r}, choose from "
            f"{', '.join(LEARNING_RATES)}."
        )
    args.optimizer = args.optimizer.lower()
    if args.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"Unknown optimizer {args.optimizer!r}, choose from {', '.join(OPTIMIZERS)}."
        )
    for key in POSITIVE_KEYS:
        value = getattr(args, key)
        if value is not None and value < 1:
            raise ValueError(f"{key} must be at least 1, got {value}.")
    for key in ("val_batches", "test_batches"):
        value = getattr(args, key)
        if value < 1 and value != -1:
            raise ValueError(f"{key} must be -1 (all) or at least 1, got {value}.")
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES[args.fine_tune_type]
    # Builds it once to find mistakes; the length of the run comes later.
    build_learning_rate(args.learning_rate, 1, args.lr_schedule, args.warmup_steps)


def fit_to_model(args: SimpleNamespace, model: nn.Module) -> None:
    """
    Clamp defaults to what the model has and refuse explicit ones beyond it.

    Args:
        args (SimpleNamespace): The settings; ``num_layers`` and
            ``max_seq_length`` may change.
        model (nn.Module): The policy.

    Raises:
        ValueError: If a given ``num_layers`` or ``max_seq_length`` is too large.

    Example:
        >>> from mlx_lm.dpo import resolve_args
        >>> model = SimpleNamespace(layers=[0] * 12, args=None)
        >>> args = resolve_args([])
        >>> fit_to_model(args, model)
        >>> args.num_layers
        12
    """
    limits = {"num_layers": len(model.layers), "max_seq_length": None}
    config = getattr(model, "args", None)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        if isinstance(positions := getattr(config, name, None), int):
            limits["max_seq_length"] = positions
            break
    for key, limit in limits.items():
        if limit is None or getattr(args, key) <= limit:
            continue
        if key in args.explicit:
            what = "layers" if key == "num_layers" else "positions"
            raise ValueError(
                f"{key} is {getattr(args, key)} but the model only has {limit} {what}."
            )
        setattr(args, key, limit)


def saved_settings(args: SimpleNamespace) -> dict:
    """
    The settings as they are written beside the adapter.

    Args:
        args (SimpleNamespace): The run's settings.

    Returns:
        dict: What ``mlx_lm.generate``, ``fuse`` and ``server`` read, and a mark
        that this is a preference run.

    Example:
        >>> from mlx_lm.dpo import resolve_args
        >>> saved_settings(resolve_args([]))["trained_with"]
        'mlx_lm.dpo'
    """
    config = {k: v for k, v in vars(args).items() if k != "explicit"}
    return {**config, "trained_with": TRAINED_WITH}


def training_args(args: SimpleNamespace) -> DPOTrainingArgs:
    """
    The part of the settings that the training loop needs.

    Args:
        args (SimpleNamespace): The run's settings.

    Returns:
        DPOTrainingArgs: The loop's settings.

    Example:
        >>> from mlx_lm.dpo import resolve_args
        >>> training_args(resolve_args(["--iters", "7"])).iters
        7
    """
    return DPOTrainingArgs(
        batch_size=args.batch_size,
        iters=args.iters,
        val_batches=args.val_batches,
        steps_per_report=args.steps_per_report,
        steps_per_eval=args.steps_per_eval,
        steps_per_save=args.save_every,
        adapter_file=str(Path(args.adapter_path) / "adapters.safetensors"),
        max_seq_length=args.max_seq_length,
        grad_checkpoint=args.grad_checkpoint,
        grad_accumulation_steps=args.grad_accumulation_steps,
        clear_cache_threshold=args.clear_cache_threshold,
        beta=args.beta,
        loss_type=args.loss_type,
        label_smoothing=args.label_smoothing,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
    )
