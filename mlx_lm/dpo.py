# Copyright © 2026 MLX Contributors

import argparse
import difflib
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import yaml
from mlx.utils import tree_flatten
from tqdm import tqdm

from . import lora
from .cli_ui import make_console, print_dpo_run_header, rprint
from .openblas import slow_blas_notice
from .tuner.callbacks import (
    CallbackList,
    MetricsFile,
    TrainingCallback,
    get_reporting_callbacks,
)
from .tuner.datasets import load_preference_dataset
from .tuner.losses import LOSSES, check_loss_options
from .tuner.reference import FrozenStart, check_same_tokens, check_same_vocabulary
from .tuner.schedules import build_learning_rate
from .tuner.trainer import DPOTrainingArgs, evaluate_dpo, train_dpo
from .tuner.utils import linear_to_lora_layers, print_trainable_parameters
from .utils import load, save_config

LEARNING_RATES = {"lora": 1e-5, "dora": 1e-5, "full": 1e-6}

CONFIG_DEFAULTS = {
    **lora.CONFIG_DEFAULTS,
    "data": None,
    "learning_rate": None,
    "beta": 0.1,
    "loss_type": "sigmoid",
    "label_smoothing": 0.0,
    "reference_model": None,
    "new_reference": False,
    "epochs": None,
    "max_grad_norm": 1.0,
    "warmup_steps": None,
    "hf_dataset": None,
    "data_dir": None,
    "prompt_feature": "prompt",
    "chosen_feature": "chosen",
    "rejected_feature": "rejected",
    "wrap_text": False,
    "transcripts": "turns",
    "valid_fraction": 0.02,
    "max_bad_rows": 0.1,
}

# Keys of mlx_lm.lora for data without preferences: accepted, without effect.
UNUSED_KEYS = ("text_feature", "completion_feature", "chat_feature")
ADAPTER_KEYS = ("fine_tune_type", "num_layers", "lora_parameters")
OPTIMIZERS = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}


def build_parser() -> argparse.ArgumentParser:
    """
    The command line: that of ``mlx_lm.lora`` and what preferences need.

    Returns:
        argparse.ArgumentParser: All values default to None, so that a YAML file
        can set each of them.

    Example:
        >>> build_parser().parse_args(["--beta", "0.2"]).beta
        0.2
    """
    parser = lora.build_parser()
    parser.description = "Preference fine-tuning with DPO, for LoRA, DoRA or full."
    parser.set_defaults(**{a.dest: None for a in parser._actions if a.dest != "help"})
    for action in parser._actions:
        if action.dest == "learning_rate":
            action.help = "Learning rate. Default: 1e-5 for adapters, 1e-6 for full."
        if action.dest == "data":
            action.help = (
                "Folder with {train, valid, test}.jsonl of preference pairs, or the "
                "name of a Hugging Face dataset (e.g., 'Anthropic/hh-rlhf')."
            )
        if action.dest == "mask_prompt":
            action.help = "Without effect: preference losses never score prompts."
    parser.add_argument(
        "--beta", type=float, help="How strongly the reference holds. Default: 0.1."
    )
    parser.add_argument(
        "--loss-type",
        type=str,
        choices=list(LOSSES),
        help="The preference loss. Default: sigmoid.",
    )
    parser.add_argument(
        "--label-smoothing",
        type=float,
        help="Probability that a label is wrong, in [0, 0.5). Default: 0.",
    )
    parser.add_argument(
        "--reference-model",
        type=str,
        help="Path or repo of another reference model. Default: the frozen start.",
    )
    parser.add_argument(
        "--epochs", type=int, help="Passes over the data; takes the place of --iters."
    )
    parser.add_argument(
        "--max-grad-norm",
        type=float,
        help="Clip the gradient to this norm, 0 for no clipping. Default: 1.",
    )
    parser.add_argument(
        "--warmup-steps",
        type=int,
        help="Optimizer updates in which the learning rate rises linearly.",
    )
    parser.add_argument(
        "--wrap-text",
        action="store_true",
        default=None,
        help="Put text rows into the chat template, as mlx_lm.lora does.",
    )
    parser.add_argument(
        "--new-reference",
        action="store_true",
        default=None,
        help="Start a new run, with a new reference, from an adapter of a DPO run.",
    )
    return parser


def check_keys(config: dict, known: Any) -> None:
    """
    Refuse a misspelt key.

    Args:
        config (dict): Settings as read from a YAML file.
        known: The keys that exist.

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


def resolve_args(argv: list[str] | None = None) -> types.SimpleNamespace:
    """
    Merge command line, YAML file and defaults, in this order of preference.

    Args:
        argv (list, optional): Arguments. Default: those of the process.

    Returns:
        SimpleNamespace: All settings; ``explicit`` lists those that were given.

    Raises:
        ValueError: If the file is not a mapping or has an unknown key.

    Example:
        >>> args = resolve_args(["--train", "--beta", "0.3"])
        >>> args.beta, args.batch_size, sorted(args.explicit)
        (0.3, 4, ['beta', 'train'])
    """
    given = {
        k: v for k, v in vars(build_parser().parse_args(argv)).items() if v is not None
    }
    if config_file := given.get("config"):
        rprint("Loading configuration file", config_file)
        with open(config_file, "r") as fid:
            config = yaml.load(fid, lora.yaml_loader) or {}
        if not isinstance(config, dict):
            raise ValueError(f"{config_file} must hold keys and values.")
        check_keys(config, [*CONFIG_DEFAULTS, *UNUSED_KEYS])
        given = {k: v for k, v in config.items() if v is not None} | given
    explicit = set(given) - {"config"}
    return types.SimpleNamespace(**{**CONFIG_DEFAULTS, **given}, explicit=explicit)


def check_args(args: types.SimpleNamespace) -> None:
    """
    Check every setting that can be checked before anything is loaded.

    Args:
        args (SimpleNamespace): What ``resolve_args`` returned. Values that
            depend on others are filled in: optimizer's lower case, learning rate.

    Raises:
        ValueError: If a setting is missing or out of range.

    Example:
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
    for key in ("batch_size", "iters", "max_seq_length", "grad_accumulation_steps"):
        if getattr(args, key) < 1:
            raise ValueError(f"{key} must be at least 1, got {getattr(args, key)}.")
    for key in ("steps_per_report", "steps_per_eval", "save_every"):
        if getattr(args, key) < 1:
            raise ValueError(f"{key} must be at least 1, got {getattr(args, key)}.")
    if args.epochs is not None and args.epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {args.epochs}.")
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES[args.fine_tune_type]
    # Builds it once to find mistakes; the length of the run comes later.
    build_learning_rate(args.learning_rate, 1, args.lr_schedule, args.warmup_steps)


def adapter_config(path: str | Path) -> dict | None:
    """
    Read the configuration that lies beside an adapter file.

    Args:
        path (str or Path): ``adapters.safetensors``, a numbered checkpoint, or
            their folder.

    Returns:
        dict: The configuration, or None if there is none.

    Example:
        >>> adapter_config("nowhere") is None
        True
    """
    path = Path(path)
    path = (path if path.is_dir() else path.parent) / "adapter_config.json"
    return json.loads(path.read_text()) if path.exists() else None


def adopt_adapter_config(args: types.SimpleNamespace) -> None:
    """
    Take rank, keys and layers from the adapter that the run starts from.

    Args:
        args (SimpleNamespace): The settings; ``resume_adapter_file`` is the
            adapter, a file or a folder.

    Raises:
        ValueError: If the adapter contradicts a setting that was given, or was
            written by a DPO run and ``new_reference`` is not set.

    Example:
        >>> args = resolve_args(["--train"])
        >>> adopt_adapter_config(args)  # nothing to start from
        >>> args.fine_tune_type
        'lora'
    """
    if args.resume_adapter_file is None:
        return
    path = Path(args.resume_adapter_file)
    path = path / "adapters.safetensors" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"resume_adapter_file {path} does not exist.")
    args.resume_adapter_file = str(path)
    config = adapter_config(path)
    if config is None:
        return
    if config.get("trained_with") == "mlx_lm.dpo" and not args.new_reference:
        raise ValueError(
            f"{path} was written by a DPO run, whose reference is not this adapter. "
            "Continue that run with --resume, or set new_reference: true to start a "
            "new one whose reference is this adapter."
        )
    for key in ADAPTER_KEYS:
        theirs, ours = config.get(key), getattr(args, key)
        if theirs is None:
            continue
        if key in args.explicit and ours != theirs:
            raise ValueError(
                f"{key} is {ours} but the adapter {path} was trained with {theirs}. "
                f"Leave {key} out, the adapter decides it."
            )
        setattr(args, key, theirs)


def fit_to_model(args: types.SimpleNamespace, model: nn.Module) -> None:
    """
    Clamp defaults to what the model has and refuse explicit ones beyond it.

    Args:
        args (SimpleNamespace): The settings; ``num_layers`` and
            ``max_seq_length`` may change.
        model (nn.Module): The policy.

    Raises:
        ValueError: If a given ``num_layers`` or ``max_seq_length`` is too large.

    Example:
        >>> model = types.SimpleNamespace(layers=[0] * 12, args=None)
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


def load_model(path: str, args: types.SimpleNamespace) -> tuple[nn.Module, Any]:
    """
    Load a model and its tokenizer, with one clear line if that fails.

    Args:
        path (str): A local folder or a Hugging Face repo.
        args (SimpleNamespace): For ``trust_remote_code``.

    Returns:
        tuple: model and tokenizer.

    Raises:
        ValueError: If there are no safetensors, the path does not exist, or the
            weights do not fit the architecture.

    Example:
        >>> load_model("/nowhere/model", resolve_args([]))
        Traceback (most recent call last):
        ...
        ValueError: The model folder /nowhere/model does not exist.
    """
    if not Path(path).exists() and (path.startswith(("/", ".", "~"))):
        raise ValueError(f"The model folder {path} does not exist.")
    try:
        return load(
            path,
            tokenizer_config={"trust_remote_code": args.trust_remote_code},
            trust_remote_code=args.trust_remote_code,
        )
    except FileNotFoundError as e:
        if "safetensors" not in str(e):
            raise
        raise ValueError(
            f"{path} has no .safetensors weights (a repo with only .bin files must be "
            "saved again with transformers: model.save_pretrained(folder))."
        ) from e


def load_reference_model(
    args: types.SimpleNamespace, tokenizer: Any = None
) -> nn.Module | None:
    """
    Load the separate reference model, if one is named.

    Args:
        args (SimpleNamespace): For ``reference_model``.
        tokenizer (optional): The policy's, to check that both agree.

    Returns:
        nn.Module: The frozen model in evaluation mode, or None: the reference is
        the policy's frozen start.

    Raises:
        ValueError: If it can't be loaded or reads token ids in another way.

    Example:
        >>> load_reference_model(resolve_args([])) is None
        True
    """
    if args.reference_model is None:
        return None
    rprint(f"Loading reference model {args.reference_model}")
    model, reference_tokenizer = load_model(args.reference_model, args)
    if tokenizer is not None:
        check_same_tokens(tokenizer, reference_tokenizer)
    model.freeze()
    model.eval()
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """
    Load trained weights into a prepared model, and drop none of them.

    Args:
        model (nn.Module): The policy, its trainable parameters set up.
        path (str or Path): An adapter file.

    Raises:
        ValueError: If a tensor is missing in the model or has another shape.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        ...     mx.save_safetensors(file.name, {"other": mx.zeros((1,))})
        ...     load_weights(nn.Linear(1, 1), file.name)
        Traceback (most recent call last):
        ...
        ValueError: ... tensor 'other' is not trained here...
    """
    trainable = dict(tree_flatten(model.trainable_parameters()))
    weights = mx.load(str(path))
    for name, w in weights.items():
        if name not in trainable:
            raise ValueError(
                f"{path} does not fit: tensor {name!r} is not trained here. Check "
                "fine_tune_type, num_layers and lora_parameters.keys."
            )
        if w.shape != trainable[name].shape:
            raise ValueError(
                f"{path} does not fit: tensor {name!r} has shape {w.shape}, the "
                f"model's is {trainable[name].shape}. Check lora_parameters.rank."
            )
    model.load_weights(list(weights.items()), strict=False)


def prepare_policy(args: types.SimpleNamespace, model: nn.Module) -> None:
    """
    Make the trained part of the model: adapters, or unfrozen layers.

    Args:
        args (SimpleNamespace): For ``fine_tune_type``, ``num_layers``,
            ``lora_parameters`` and ``resume_adapter_file``.
        model (nn.Module): The policy; changed in place.

    Raises:
        ValueError: If the adapter to start from does not fit.

    Example:
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = [nn.Linear(4, 4)]
        >>> model = Model()
        >>> prepare_policy(resolve_args(["--num-layers", "1"]), model)
        >>> [name for name, _ in tree_flatten(model.trainable_parameters())]
        ['layers.0.lora_a', 'layers.0.lora_b']
    """
    mx.random.seed(args.seed)
    model.freeze()
    if args.fine_tune_type == "full":
        first = 0 if args.num_layers == -1 else len(model.layers) - args.num_layers
        for layer in model.layers[first:]:
            layer.unfreeze()
        args.lora_parameters = None
    else:
        linear_to_lora_layers(
            model,
            args.num_layers,
            args.lora_parameters,
            use_dora=(args.fine_tune_type == "dora"),
        )
    if args.resume_adapter_file is not None:
        rprint(f"Starting from the weights in {args.resume_adapter_file}")
        load_weights(model, args.resume_adapter_file)


def saved_settings(args: types.SimpleNamespace) -> dict:
    """
    The settings as they are written beside the adapter.

    Args:
        args (SimpleNamespace): The run's settings.

    Returns:
        dict: What ``mlx_lm.generate``, ``fuse`` and ``server`` read, and a mark
        that this is a preference run.

    Example:
        >>> saved_settings(resolve_args([]))["trained_with"]
        'mlx_lm.dpo'
    """
    config = {k: v for k, v in vars(args).items() if k != "explicit"}
    return {**config, "trained_with": "mlx_lm.dpo"}


def training_args(args: types.SimpleNamespace) -> DPOTrainingArgs:
    """
    The part of the settings that the training loop needs.

    Args:
        args (SimpleNamespace): The run's settings.

    Returns:
        DPOTrainingArgs: The loop's settings.

    Example:
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


def _header_rows(args, train_set, valid_set, reference_model):
    per_epoch = -(-len(train_set) // args.batch_size)
    reference = args.reference_model or "the frozen start"
    if reference_model is None and args.resume_adapter_file:
        reference = f"{args.resume_adapter_file}, frozen"
    rows = [
        ("data", str(args.hf_dataset or args.data)),
        ("pairs", f"{len(train_set):,} train · {len(valid_set):,} valid"),
        ("an epoch", f"{per_epoch:,} iters · {args.iters / per_epoch:.3g} epochs"),
        ("rows are", f"{train_set.shape} · {train_set.format}"),
        ("reference", reference),
    ]
    return [(label, text.replace("[", r"\[")) for label, text in rows]


def train_model(
    args: types.SimpleNamespace,
    model: nn.Module,
    train_set: Any,
    valid_set: Any,
    training_callback: TrainingCallback | None = None,
    reference_model: nn.Module | None = None,
) -> FrozenStart | nn.Module:
    """
    Train the policy and write the adapter, its settings and its metrics.

    Args:
        args (SimpleNamespace): The run's settings.
        model (nn.Module): The policy; changed in place.
        train_set (PreferenceDataset): The pairs.
        valid_set (PreferenceDataset): Held-out pairs, may be empty.
        training_callback (TrainingCallback, optional): Gets the metrics.
        reference_model (nn.Module, optional): Default: the policy's start.

    Returns:
        The reference that was used, for ``evaluate_model``.

    Raises:
        ValueError: If there are fewer pairs than ``batch_size``, or the adapter
            to start from does not fit.

    Example:
        >>> train_model.__name__  # DPO.md shows it from Python
        'train_model'
    """
    if len(train_set) < args.batch_size:
        raise ValueError(
            f"The training set has {len(train_set)} usable pairs, fewer than "
            f"batch_size={args.batch_size}. Lower batch_size or add pairs."
        )
    prepare_policy(args, model)
    reference = reference_model or FrozenStart(model)
    if args.epochs is not None:
        args.iters = args.epochs * -(-len(train_set) // args.batch_size)
    updates = -(-args.iters // args.grad_accumulation_steps)
    rate, notices = build_learning_rate(
        args.learning_rate, updates, args.lr_schedule, args.warmup_steps
    )
    if mx.distributed.init().rank() == 0:
        rows = _header_rows(args, train_set, valid_set, reference_model)
        print_dpo_run_header(make_console(), args, rows)
        adapter_path = Path(args.adapter_path)
        adapter_path.mkdir(parents=True, exist_ok=True)
        save_config(saved_settings(args), adapter_path / "adapter_config.json")
        metrics_file = MetricsFile(adapter_path / "metrics.jsonl")
        training_callback = CallbackList([metrics_file, training_callback])
    for notice in notices:
        rprint(notice)
    print_trainable_parameters(model)
    optimizer = OPTIMIZERS[args.optimizer](
        learning_rate=rate, **args.optimizer_config.get(args.optimizer, {})
    )
    train_dpo(
        model,
        optimizer,
        train_set,
        valid_set or None,
        training_args(args),
        reference,
        training_callback,
    )
    return reference


def evaluate_model(
    args: types.SimpleNamespace, model: nn.Module, test_set: Any, reference_model: Any
) -> dict[str, float]:
    """
    Evaluate on the test set and print the start beside the result.

    Args:
        args (SimpleNamespace): The run's settings.
        model (nn.Module): The policy.
        test_set (PreferenceDataset): The pairs.
        reference_model: A ``FrozenStart`` or another model.

    Returns:
        dict: The metrics, as ``evaluate_dpo`` names them.

    Example:
        >>> evaluate_model.__name__  # DPO.md shows it from Python
        'evaluate_model'
    """
    batches = -(-len(test_set) // args.batch_size)
    if args.test_batches != -1:
        batches = min(batches, args.test_batches)
    quiet = mx.distributed.init().rank() != 0
    with tqdm(total=batches, desc="Testing", disable=quiet, leave=False) as pbar:
        metrics = evaluate_dpo(
            model,
            reference_model,
            test_set,
            args.batch_size,
            args.test_batches,
            args.beta,
            max_seq_length=args.max_seq_length,
            label_smoothing=args.label_smoothing,
            loss_type=args.loss_type,
            clear_cache_threshold=args.clear_cache_threshold,
            progress_callback=pbar.update,
        )
    before = "start" if isinstance(reference_model, FrozenStart) else "reference"
    accuracies = ("logps/accuracies", "logps/accuracies_per_token")
    rows = [
        ("reward accuracy", "-", f"{metrics['rewards/accuracies']:.1%}"),
        ("reward margin (nats)", "-", f"{metrics['rewards/margins']:.3f}"),
    ]
    for label, key in zip(("chosen likelier", "chosen likelier per token"), accuracies):
        rows.append(
            (label, f"{metrics[f'reference_{key}']:.1%}", f"{metrics[key]:.1%}")
        )
    for label, key in (("perplexity of chosen", "perplexity"),):
        rows.append(
            (
                label,
                f"{metrics[f'{key}/reference']:.2f}",
                f"{metrics[f'{key}/policy']:.2f}",
            )
        )
    rows.append(("KL per token (nats)", "-", f"{metrics['kl']:.4f}"))
    rprint(f"{f'Test, {len(test_set):,} pairs':<28}{before:>10}{'policy':>10}")
    for label, start, now in rows:
        rprint(f"{label:<28}{start:>10}{now:>10}")
    return metrics


def _prepare_test(args, model):
    """Rebuild the start of a finished run, then load what it trained."""
    config = adapter_config(args.adapter_path)
    if config is None:
        raise ValueError(
            f"{args.adapter_path} has no adapter_config.json. Give --adapter-path the "
            "folder of a run, or '' to test the model as it is."
        )
    kept = (*ADAPTER_KEYS, "beta", "loss_type", "label_smoothing", "reference_model")
    for key in (*kept, "resume_adapter_file"):
        if key in config and key not in args.explicit:
            setattr(args, key, config[key])
    prepare_policy(args, model)
    start = FrozenStart(model)
    load_weights(model, Path(args.adapter_path) / "adapters.safetensors")
    return start


def run(
    args: types.SimpleNamespace, training_callback: TrainingCallback | None = None
) -> None:
    """
    Do what the settings ask for: train, test, or both.

    Args:
        args (SimpleNamespace): What ``resolve_args`` returns. Missing settings
            get their defaults.
        training_callback (TrainingCallback, optional): Called beside those that
            ``report_to`` names.

    Raises:
        ValueError: If a setting or the data is unusable.

    Example:
        >>> run(resolve_args(["--data", "pairs"]))
        Traceback (most recent call last):
        ...
        ValueError: Must provide at least one of --train or --test
    """
    explicit = getattr(args, "explicit", set(vars(args)))
    args = types.SimpleNamespace(**{**CONFIG_DEFAULTS, **vars(args)})
    args.explicit = explicit
    adopt_adapter_config(args)
    check_args(args)
    np.random.seed(args.seed)
    if args.mask_prompt:
        rprint("mask_prompt has no effect: preference losses never score prompts.")
    if (notice := slow_blas_notice()) is not None:
        rprint(f"[WARNING] {notice}")
    reporting = None
    if args.train and mx.distributed.init().rank() == 0 and args.report_to:
        Path(args.adapter_path).mkdir(parents=True, exist_ok=True)
        reporting = get_reporting_callbacks(
            args.report_to,
            project_name=args.project_name,
            log_dir=args.adapter_path,
            config=saved_settings(args),
        )

    rprint("Loading pretrained model")
    model, tokenizer = load_model(args.model, args)
    fit_to_model(args, model)
    reference_model = load_reference_model(args, tokenizer)
    if reference_model is not None:
        check_same_vocabulary(model, reference_model, len(tokenizer.get_vocab()))

    rprint("Loading datasets")
    train_set, valid_set, test_set = load_preference_dataset(args, tokenizer)

    if args.train:
        reference = train_model(
            args,
            model,
            train_set,
            valid_set,
            CallbackList([reporting, training_callback]),
            reference_model,
        )
        rprint(f"Saved the adapter to {args.adapter_path}")
    elif args.adapter_path:
        reference = _prepare_test(args, model)
        reference = load_reference_model(args, tokenizer) or reference
    else:
        reference = reference_model or model
    if args.test:
        evaluate_model(args, model, test_set, reference)


def main() -> None:
    """
    The command ``mlx_lm.dpo``.

    Raises:
        SystemExit: With code 2 and one line if the input is unusable; with
            ``MLX_LM_DEBUG=1`` the error itself is raised.

    Example:
        >>> main.__name__
        'main'
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        run(resolve_args())
    except (ValueError, ImportError, OSError, yaml.YAMLError) as e:
        if os.environ.get("MLX_LM_DEBUG"):
            raise
        print(f"Error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
