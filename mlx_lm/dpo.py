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
from tqdm import tqdm

from . import lora
from .cli_ui import make_console, print_dpo_run_header, print_test_table, rprint
from .openblas import slow_blas_notice
from .tuner.atomic_files import (
    remove_leftovers,
    replace_file,
    user_cache_folder,
    writing,
)
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
    read_config,
    saved_settings,
    training_args,
)
from .tuner.fingerprint import model_fingerprint
from .tuner.length_buckets import (
    LAYOUTS,
    batches_per_epoch,
    needed_tokens,
    padded_tokens,
    pair_lengths,
    plan_batches,
)
from .tuner.losses import LOSSES
from .tuner.master_weights import with_master_weights
from .tuner.policy import (
    adapter_config,
    adopt_adapter_config,
    adopt_finished_run,
    load_model,
    load_weights,
    prepare_policy,
    read_weights,
    slow_dtype_notice,
)
from .tuner.preference_run import BEST, TrainingStopped
from .tuner.reference import FrozenStart, check_same_tokens, check_token_ids
from .tuner.reference_cache import ReferenceCache
from .tuner.remembered_reference import RememberedReference
from .tuner.resume import adopt_resumed_run, check_identity, data_fingerprint
from .tuner.run_plan import (
    check_memory,
    describe_memory,
    describe_plan,
    training_plan,
)
from .tuner.schedules import build_learning_rate
from .tuner.sharing import Sharing, check_packing, check_sharing
from .tuner.trainer import evaluate_dpo, train_dpo
from .tuner.training_state import drop_newer, newest_state
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
    "share_prompt": True,
    "pack": False,
    "train_head": False,
    "reference_cache": None,
    "token_cache": None,
    "dry_run": False,
    "resume": None,
    "resume_anyway": False,
    "keep_checkpoints": None,
    "save_best": None,
    "max_skipped_steps": 10,
    "debug_gradients": False,
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
    parser.error = _refuse_flags
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
        "--train-head",
        action="store_true",
        default=None,
        help="Train the output head too, and tied embeddings with it.",
    )
    parser.add_argument(
        "--no-share-prompt",
        dest="share_prompt",
        action="store_false",
        default=None,
        help="Compute each prompt twice, once for each answer.",
    )
    parser.add_argument(
        "--pack",
        action="store_true",
        default=None,
        help="Put several sequences in a row, instead of sharing prompts.",
    )
    for name, what in (
        ("reference", "the reference's log-probs"),
        ("token", "the token ids of large data sets"),
    ):
        parser.add_argument(
            f"--{name}-cache",
            type=str,
            metavar="DIR",
            help=f"Folder that keeps {what}. Default: in the user's cache folder.",
        )
        parser.add_argument(
            f"--no-{name}-cache",
            dest=f"{name}_cache",
            action="store_false",
            default=None,
            help=f"Don't keep {what} on disk.",
        )
    parser.add_argument(
        "--resume",
        type=str,
        metavar="DIR",
        help="Go on with the run in this adapter folder; needs no other flag.",
    )
    parser.add_argument(
        "--resume-anyway",
        action="store_true",
        default=None,
        help="Resume although data, model or settings are not those of the start.",
    )
    parser.add_argument(
        "--keep-checkpoints",
        type=int,
        metavar="N",
        help="Keep the newest N checkpoints. Default: every adapter.",
    )
    parser.add_argument(
        "--save-best",
        type=str,
        choices=list(BEST),
        help="Keep the adapter that validates best in the folder best/.",
    )
    parser.add_argument(
        "--debug-gradients",
        action="store_true",
        default=None,
        help="Write the gradient of every module to metrics.jsonl at each report.",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        default=None,
        help="Print plan, batches and predicted memory, and stop.",
    )
    parser.add_argument(
        "--new-reference",
        action="store_true",
        default=None,
        help="Start a new run, with a new reference, from an adapter of a DPO run.",
    )
    return parser


def _refuse_flags(message):
    # In one line, where argparse prints all flags.
    raise ValueError(f"{message}. See mlx_lm.dpo --help.")


def resolve_args(argv: list[str] | None = None) -> SimpleNamespace:
    """
    Merge command line, YAML file and defaults, in this order of preference.

    Args:
        argv (list, optional): Arguments. Default: those of the process.

    Returns:
        SimpleNamespace: All settings; ``explicit`` lists those that were given.

    Raises:
        ValueError: If a flag or a key is unknown, or the file can't be read.

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
        config = read_config(config_file, lora.yaml_loader)
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


def remember_reference(
    args: SimpleNamespace,
    policy: nn.Module,
    reference_model: nn.Module | None,
    *datasets: Any,
) -> RememberedReference:
    """
    The run's reference, with what earlier runs found out about the same one.

    Args:
        args (SimpleNamespace): For ``reference_cache`` and ``test``.
        policy (nn.Module): The model to train, as it starts.
        reference_model (nn.Module, optional): Default: the policy's start.
        datasets (PreferenceDataset): The pairs that it will be asked about.

    Returns:
        RememberedReference: Without its model where everything is known.

    Example:
        >>> args = resolve_args(["--no-reference-cache"])
        >>> pairs = [([1], [2], [3], (1, 2, 2))]
        >>> remember_reference(args, nn.Linear(1, 1), None, pairs).model is not None
        True
    """
    folder = args.reference_cache
    if folder is not False:
        folder = Path(folder) if folder else user_cache_folder("references")
        remove_leftovers(folder)
    reference = RememberedReference(
        reference_model or FrozenStart(policy),
        ReferenceCache(folder or None, model_fingerprint(reference_model or policy)),
        # The test compares both models' whole distributions.
        keep=args.test,
    )
    reference.release(*datasets)
    return reference


def _header_rows(args, train_set, valid_set, reference, plan, estimate):
    per_epoch = batches_per_epoch(plan, args.batch_size)
    name = args.reference_model or "the frozen start"
    if args.reference_model is None and args.resume_adapter_file:
        name = f"{args.resume_adapter_file}, frozen"
    known = len(train_set) - reference.unknown(train_set)
    name += f" · {known:,} of {len(train_set):,} pairs known" if known else ""
    lengths = pair_lengths(train_set)
    needed = needed_tokens(plan, lengths)
    padding = 1 - needed / padded_tokens(plan, args.batch_size, lengths)
    shared = "shared" if any(b.shape.prompt for b in plan) else "not shared"
    shared += ", rows packed" if args.pack else ""
    rows = [
        ("data", str(args.hf_dataset or args.data)),
        ("pairs", f"{len(train_set):,} train · {len(valid_set):,} valid"),
        ("an epoch", f"{per_epoch:,} iters · {args.iters / per_epoch:.3g} epochs"),
        ("rows are", f"{train_set.shape} · {train_set.format}"),
        ("prompts", f"{shared} · {len(plan)} batch shapes · {padding:.0%} padding"),
        ("reference", name),
        ("peak memory", describe_memory(estimate)),
    ]
    return [(label, text.replace("[", r"\[")) for label, text in rows]


def _optimizer(args, settings, plan):
    """The optimizer, its schedule as long as the run; and what to say about it."""
    if args.epochs is not None:
        args.iters = args.epochs * batches_per_epoch(plan, args.batch_size)
        settings.iters = args.iters
    updates = -(-args.iters // args.grad_accumulation_steps)
    rate, notices = build_learning_rate(
        args.learning_rate, updates, args.lr_schedule, args.warmup_steps
    )
    return build_optimizer(args.optimizer, rate, args.optimizer_config), notices


def _find_sharing(args, model, reference_model):
    """What the settings ask for, as far as policy and reference can."""
    # The reference runs on the same batches.
    models = [m for m in (model, reference_model) if isinstance(m, nn.Module)]
    if args.pack:
        return [check_packing(m, args.max_seq_length) for m in models][0]
    # Also finds out whether a model can be taken apart, shared or not.
    found = max(
        (check_sharing(m) for m in models), key=lambda s: LAYOUTS.index(s.grade)
    )
    if args.share_prompt:
        return found
    return Sharing("plain", "" if found.grade == "plain" else found.notice)


def _checkpoint(args, identity):
    """The state to go on with, None if the run has not got that far."""
    state = newest_state(args.adapter_path)
    if state is None:
        rprint(f"{args.adapter_path} has no checkpoint yet: the run starts again.")
        return None
    check_identity(state, identity, args)
    if state.iteration >= args.iters and not state.info["pending"]:
        rprint(
            f"The run in {args.adapter_path} is complete: it has taken all of its "
            f"{state.iteration:,} steps. To train on, give a larger --iters."
        )
        return state
    rprint(f"Going on after step {state.iteration:,} of {args.iters:,}.")
    before = adapter_config(args.adapter_path) or {}
    if before.get("iters") not in (None, args.iters):
        rprint(
            f"The run has {args.iters:,} steps now instead of {before['iters']:,}: a "
            f"learning rate schedule ends at step {args.iters:,}."
        )
    return state


def train_model(
    args: SimpleNamespace,
    model: nn.Module,
    train_set: Any,
    valid_set: Any,
    training_callback: TrainingCallback | None = None,
    reference_model: nn.Module | None = None,
) -> RememberedReference:
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
    settings = training_args(args)
    # Every family but one in a hundred can, and asking would allocate the model.
    settings.sharing = "equal" if args.share_prompt else "plain"
    if args.pack:
        settings.sharing = "packed"
    optimizer, notices = _optimizer(args, settings, training_plan(train_set, settings))
    estimate = check_memory(
        model,
        reference_model or FrozenStart(model),
        with_master_weights(optimizer, model),
        train_set,
        settings,
    )
    read_weights(model, args.model)
    if reference_model is not None:
        read_weights(reference_model, args.reference_model)
    sharing = _find_sharing(args, model, reference_model)
    settings.sharing = sharing.grade
    # Before a checkpoint is loaded: what the run started with.
    reference = remember_reference(
        args, model, reference_model, train_set, valid_set or []
    )
    start = reference.cache.fingerprint
    if reference_model is not None:
        start = model_fingerprint(model)
    del reference_model
    plan = training_plan(train_set, settings)
    optimizer, notices = _optimizer(args, settings, plan)
    identity = {
        "model": start,
        "reference": reference.cache.fingerprint,
        "train": data_fingerprint(train_set),
        "valid": data_fingerprint(valid_set),
    }
    state = None
    if args.resume and not args.dry_run:
        state = _checkpoint(args, identity)
    if mx.distributed.init().rank() == 0:
        rows = _header_rows(args, train_set, valid_set, reference, plan, estimate)
        print_dpo_run_header(make_console(), args, rows)
    if sharing.notice:
        rprint(sharing.notice)
    if args.dry_run:
        for line in describe_plan(plan, args.batch_size):
            rprint(line)
        return reference
    if mx.distributed.init().rank() == 0:
        adapter_path = Path(args.adapter_path)
        with writing(adapter_path):
            adapter_path.mkdir(parents=True, exist_ok=True)
        config = saved_settings(args)
        reporting = get_reporting_callbacks(
            args.report_to, args.project_name, args.adapter_path, config
        )
        for folder in (adapter_path, adapter_path / "best"):
            remove_leftovers(folder)
        # An earlier run's states do not belong to these settings.
        drop_newer(adapter_path, state.iteration if state else -1)
        config_file = adapter_path / "adapter_config.json"
        with writing(config_file):
            replace_file(config_file, lambda name: save_config(config, name))
        written = state.info["metrics_bytes"] if state else 0
        metrics_file = MetricsFile(adapter_path / "metrics.jsonl", written)
        training_callback = CallbackList([metrics_file, reporting, training_callback])
    for notice in notices:
        rprint(notice)
    print_trainable_parameters(model)
    train_dpo(
        model,
        optimizer,
        train_set,
        valid_set or None,
        settings,
        reference,
        training_callback,
        resume=state,
        identity=identity,
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
    grade = _find_sharing(args, model, reference_model).grade
    buckets = plan_batches(
        test_set,
        args.batch_size,
        grade,
        max_length=args.max_seq_length,
        min_batches=1,
        ranks=mx.distributed.init().size(),
    )
    batches = batches_per_epoch(buckets, args.batch_size)
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
            buckets=buckets,
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
    if args.resume:
        adopt_resumed_run(args, CONFIG_DEFAULTS)
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
        # Handed over, not kept: it is freed as soon as its numbers are known.
        handed = [reference_model]
        del reference_model
        remembered = train_model(
            args, model, train_set, valid_set, training_callback, handed.pop()
        )
        reference = remembered.model
        if args.dry_run:
            rprint("Dry run: nothing was trained.")
            return
        rprint(f"Saved the adapter to {args.adapter_path}")
    elif args.adapter_path:
        prepare_policy(args, model)
        reference = reference_model or FrozenStart(model)
        load_weights(model, Path(args.adapter_path) / "adapters.safetensors")
    else:
        reference = reference_model or model
    if args.test:
        read_weights(model, args.model)
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
    except (ValueError, ImportError, OSError) as e:
        if os.environ.get("MLX_LM_DEBUG"):
            raise
        sys.exit(_one_line(e, 2))
    except KeyboardInterrupt:
        sys.exit(_one_line("interrupted.", 130))
    except TrainingStopped as e:
        if os.environ.get("MLX_LM_DEBUG"):
            raise
        sys.exit(_one_line(e, 1))


def _one_line(error, code):
    print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
