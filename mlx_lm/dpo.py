# Copyright © 2026 MLX Contributors

import argparse
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import yaml
from tqdm import tqdm

from . import lora
from .cli_ui import make_console, print_dpo_run_header, print_test_table, rprint
from .openblas import slow_blas_notice
from .tuner.callbacks import (
    CallbackList,
    MetricsFile,
    TrainingCallback,
    get_reporting_callbacks,
)
from .tuner.datasets import load_preference_dataset
from .tuner.dpo_config import (
    build_optimizer,
    check_args,
    check_keys,
    check_types,
    fit_to_model,
    saved_settings,
    training_args,
)
from .tuner.losses import LOSSES
from .tuner.policy import (
    adopt_adapter_config,
    adopt_finished_run,
    load_model,
    load_weights,
    prepare_policy,
    slow_dtype_notice,
)
from .tuner.reference import FrozenStart, check_same_tokens, check_token_ids
from .tuner.schedules import build_learning_rate
from .tuner.trainer import evaluate_dpo, train_dpo
from .tuner.utils import print_trainable_parameters
from .utils import save_config

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
    # --resume-adapter-file must not answer to a shorter name.
    parser.allow_abbrev = False
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


def resolve_args(argv: list[str] | None = None) -> SimpleNamespace:
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
        if "iters" in given:
            config.pop("epochs", None)  # Both say how long; the command line wins.
        given = {k: v for k, v in config.items() if v is not None} | given
    explicit = set(given) - {"config"}
    return SimpleNamespace(**{**CONFIG_DEFAULTS, **given}, explicit=explicit)


def load_reference_model(
    args: SimpleNamespace, tokenizer: Any = None
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
    args: SimpleNamespace,
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
    optimizer = build_optimizer(args.optimizer, rate, args.optimizer_config)
    if mx.distributed.init().rank() == 0:
        rows = _header_rows(args, train_set, valid_set, reference_model)
        print_dpo_run_header(make_console(), args, rows)
        adapter_path = Path(args.adapter_path)
        adapter_path.mkdir(parents=True, exist_ok=True)
        settings = saved_settings(args)
        reporting = get_reporting_callbacks(
            args.report_to, args.project_name, args.adapter_path, settings
        )
        save_config(settings, adapter_path / "adapter_config.json")
        metrics_file = MetricsFile(adapter_path / "metrics.jsonl")
        training_callback = CallbackList([metrics_file, reporting, training_callback])
    for notice in notices:
        rprint(notice)
    print_trainable_parameters(model)
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
    args: SimpleNamespace, model: nn.Module, test_set: Any, reference_model: Any
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
    if not quiet:
        before = "start" if isinstance(reference_model, FrozenStart) else "reference"
        print_test_table(make_console(), metrics, before)
    return metrics


def run(
    args: SimpleNamespace, training_callback: TrainingCallback | None = None
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
    given = {k: v for k, v in vars(args).items() if v is not None}
    if "explicit" not in given:
        given["explicit"] = {k for k in given if given[k] != CONFIG_DEFAULTS.get(k)}
    args = SimpleNamespace(**{**CONFIG_DEFAULTS, **given})
    check_keys(vars(args), [*CONFIG_DEFAULTS, *UNUSED_KEYS, "explicit"])
    check_types(vars(args), CONFIG_DEFAULTS)
    if args.train:
        adopt_adapter_config(args)
    elif args.test and args.adapter_path:
        adopt_finished_run(args)
    given = {k: v for k, v in args.lora_parameters.items() if v is not None}
    args.lora_parameters = {**CONFIG_DEFAULTS["lora_parameters"], **given}
    check_args(args)
    np.random.seed(args.seed)
    if args.mask_prompt:
        rprint("mask_prompt has no effect: preference losses never score prompts.")
    if (notice := slow_blas_notice()) is not None:
        rprint(f"[WARNING] {notice}")

    rprint("Loading pretrained model")
    model, tokenizer = load_model(args.model, args)
    fit_to_model(args, model)
    if (notice := slow_dtype_notice(model)) is not None:
        rprint(f"[WARNING] {notice}")
    reference_model = load_reference_model(args, tokenizer)
    if reference_model is not None:
        check_token_ids(reference_model, max(tokenizer.get_vocab().values()))

    rprint("Loading datasets")
    train_set, valid_set, test_set = load_preference_dataset(args, tokenizer)
    sets = [dataset for dataset in (train_set, valid_set, test_set) if dataset]
    check_token_ids(model, max(dataset.largest_token() for dataset in sets))
    # A warning that holds for every set is said once.
    for line in dict.fromkeys(line for dataset in sets for line in dataset.summary()):
        rprint(line)
    if train_set:
        rprint(train_set.preview())

    if args.train:
        reference = train_model(
            args,
            model,
            train_set,
            valid_set,
            training_callback,
            reference_model,
        )
        rprint(f"Saved the adapter to {args.adapter_path}")
    elif args.adapter_path:
        prepare_policy(args, model)
        reference = reference_model or FrozenStart(model)
        load_weights(model, Path(args.adapter_path) / "adapters.safetensors")
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
