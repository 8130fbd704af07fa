# Copyright © 2026 MLX Contributors

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
    writing,
)
from .tuner.callbacks import (
    CallbackList,
    MetricsFile,
    TrainingCallback,
    get_reporting_callbacks,
)
from .tuner.config_file import read_config
from .tuner.datasets import load_preference_dataset
from .tuner.dpo_config import (
    check_args,
    check_keys,
    check_types,
    fit_to_model,
    saved_settings,
    training_args,
)
from .tuner.dpo_parser import CONFIG_DEFAULTS, UNUSED_KEYS, build_parser
from .tuner.fingerprint import model_fingerprint
from .tuner.length_buckets import (
    batches_per_epoch,
    plan_batches,
)
from .tuner.master_weights import with_master_weights
from .tuner.policy import (
    adopt_adapter_config,
    adopt_finished_run,
    load_model,
    load_weights,
    prepare_policy,
    read_weights,
    slow_dtype_notice,
)
from .tuner.preference_run import TrainingStopped
from .tuner.ranks import is_lost_rank, start_together
from .tuner.reference import FrozenStart, check_token_ids
from .tuner.remembered_reference import RememberedReference
from .tuner.resume import adopt_resumed_run, data_fingerprint
from .tuner.run_plan import (
    check_memory,
    describe_plan,
    training_plan,
)
from .tuner.run_setup import (
    find_checkpoint,
    find_sharing,
    header_rows,
    load_reference_model,
    make_optimizer,
    remember_reference,
)
from .tuner.trainer import evaluate_dpo, train_dpo
from .tuner.training_state import drop_newer
from .tuner.utils import print_trainable_parameters
from .utils import save_config


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
    optimizer, notices = make_optimizer(
        args, settings, training_plan(train_set, settings)
    )
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
    sharing = find_sharing(args, model, reference_model)
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
    optimizer, notices = make_optimizer(args, settings, plan)
    identity = {
        "model": start,
        "reference": reference.cache.fingerprint,
        "train": data_fingerprint(train_set),
        "valid": data_fingerprint(valid_set),
    }
    state = None
    if args.resume and not args.dry_run:
        state = find_checkpoint(args, identity)
    if mx.distributed.init().rank() == 0:
        rows = header_rows(args, train_set, valid_set, reference, plan, estimate)
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
    start_together()
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
    grade = find_sharing(args, model, reference_model).grade
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
        start_together()
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
    args = None
    try:
        args = resolve_args()
        run(args)
    except (ValueError, ImportError, OSError) as e:
        if os.environ.get("MLX_LM_DEBUG"):
            raise
        sys.exit(_one_line(e, 2) if start_together(failed=True) else 2)
    except KeyboardInterrupt:
        sys.exit(_one_line("interrupted.", 130))
    except TrainingStopped as e:
        if os.environ.get("MLX_LM_DEBUG"):
            raise
        sys.exit(_one_line(e, 1))
    except RuntimeError as e:
        if not is_lost_rank(e) or os.environ.get("MLX_LM_DEBUG"):
            raise
        text = "Rank lost: another process of this run has ended."
        if args is not None and (args.train or args.resume):
            text += f" Go on with: --resume {args.resume or args.adapter_path}"
        sys.exit(_one_line(text, 1))


def _one_line(error, code):
    print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
