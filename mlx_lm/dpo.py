# Copyright © 2026 MLX Contributors

import copy
import gc
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import lora
from .preference.data.secrets import without_secrets
from .preference.device import (
    compiles,
    prepare_backend,
    slow_blas_notice,
    slow_dtype_notice,
)
from .preference.errors import InputError
from .preference.files import user_cache_folder
from .preference.forward.frozen import FrozenStart
from .preference.objective.objective import objective_of
from .preference.policy import model as models
from .preference.policy.optimizer import with_master_weights
from .preference.ranks import is_lost_rank, start_together
from .preference.reference.remembered import RememberedReference
from .preference.report import evaluate
from .preference.report.inspect import show_pairs
from .preference.report.page import LEFT_BY_TESTS, show_report
from .preference.report.table import short_names
from .preference.run import setup
from .preference.run.best import check_validated
from .preference.run.folder import CallbackList, check_folder, open_folder
from .preference.run.forecast import check_memory, check_test_memory
from .preference.run.lock import folder_kept
from .preference.run.loop import TrainingStopped
from .preference.run.plan import describe_plan, training_plan
from .preference.run.screen import print_header
from .preference.settings.checks import check_keys, fit_to_model
from .preference.settings.finished import finished_runs, settle
from .preference.settings.parser import build_parser, read_config
from .preference.settings.table import CONFIG_DEFAULTS, UNUSED_KEYS, names
from .preference.terminal import lasting_output, rprint, visible
from .preference.watch.retained_text import scored_text
from .preference.watch.trackers import reporting_callbacks
from .preference.watch.watchers import WatchedRun, run_watchers
from .tuner.callbacks import TrainingCallback
from .tuner.trainer import train_dpo
from .tuner.utils import print_trainable_parameters


def resolve_args(argv: list[str] | None = None) -> SimpleNamespace:
    """
    Merge command line, YAML file and defaults, in this order of preference.

    Args:
        argv (list, optional): Arguments. Default: those of the process.

    Returns:
        SimpleNamespace: All settings; ``explicit`` lists those that were given.

    Raises:
        mlx_lm.preference.errors.InputError: If a flag or a key is unknown, or the file can't be read.

    Example:
        >>> args = resolve_args(["--train", "--beta", "0.3"])
        >>> args.beta, args.batch_size, sorted(args.explicit)
        (0.3, 4, ['beta', 'train'])
    """
    flags = vars(build_parser().parse_args(argv))
    given = {k: v for k, v in flags.items() if v is not None}
    if len(folders := given.get("adapter_path", [])) == 1:
        given["adapter_path"] = folders[0]
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
    """Train the policy and write the adapter, its settings and its metrics."""
    if len(train_set) < args.batch_size:
        raise InputError(
            f"The training set has {len(train_set)} usable pairs, fewer than "
            f"batch_size={args.batch_size}. Lower batch_size or add pairs."
        )
    check_validated(args, valid_set)
    setup.make_policy(args, model)
    optimizer, _ = setup.make_optimizer(args, len(train_set))
    settings = setup.training_args(args, setup.likely_sharing(args))
    compared = settings.objective.needs_reference
    start = (reference_model or FrozenStart(model)) if compared else None
    joins = compiles(settings.compile) and not settings.debug_gradients
    masters = with_master_weights(optimizer, model, joins)
    estimate = check_memory(model, start, masters, train_set, settings)
    del start, masters
    models.read_weights(model, args.model)
    if reference_model is not None:
        models.read_weights(reference_model, args.reference_model)
    sharing = setup.find_sharing(args, model, reference_model)
    settings = replace(settings, sharing=sharing.grade)
    sets = train_set, valid_set or []
    reference = setup.remember_reference(args, model, reference_model, *sets)
    identity = setup.run_identity(model, reference_model, reference, *sets)
    # Where all its numbers are known, nothing else holds it.
    del reference_model
    # A test measures from the start, wherever training moves the reference to.
    kept = FrozenStart(model) if args.sync_reference and args.test else None
    resumes = args.resume and not args.dry_run
    state = setup.find_checkpoint(args, identity) if resumes else None
    optimizer, notices = setup.make_optimizer(args, len(train_set), state)
    if state:
        models.fitting_weights(model, state.adapter)
    watched = WatchedRun(
        Path(args.adapter_path),
        model,
        train_set.tokenizer,
        valid_set,
        # Rewards are measured from the policy as it was.
        compared and not (args.reference_model or args.sync_reference),
        args.sample_prompts,
        args.sample_tokens,
    )
    is_first = mx.distributed.init().rank() == 0
    if is_first:
        plan = training_plan(train_set, settings)
        rows = setup.header_rows(args, train_set, valid_set, reference, plan, estimate)
        print_header("mlx_lm.dpo", rows)
        for line in filter(None, (sharing.notice, sharing.warning)):
            rprint(line)
        for line in describe_plan(plan, args.batch_size) if args.dry_run else []:
            rprint(line)
        watched.check()
        check_folder(args.adapter_path)
    # Whatever any rank refuses, nothing of an earlier run is touched until here.
    _start_together(args, lambda: setup.rank_inputs(identity, state))
    if args.dry_run:
        return reference
    if is_first:
        training_callback = _open_folder(args, state, watched, training_callback)
    for notice in notices:
        rprint(notice)
    print_trainable_parameters(model)
    with _scored_text(args, model, train_set.tokenizer):
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
    reference.model = kept or reference.model
    return reference


def _start_together(args, loaded):
    """Wait for all ranks, and refuse any that has other settings or inputs."""
    settings = {name: getattr(args, name) for name in names(per_rank=False)}
    start_together(inputs=lambda: {**settings, **loaded()})


def _open_folder(args, state, watched, training_callback):
    """Make the adapter folder ready, and what gets the run's reports."""
    services = args.report_to, args.project_name, args.adapter_path
    metrics = open_folder(
        args.adapter_path,
        vars(args),
        state,
        training_callback,
        partial(reporting_callbacks, *services),
    )
    watchers = run_watchers(watched, state, LEFT_BY_TESTS)
    return CallbackList([metrics, CallbackList(watchers, careful=True)])


def evaluate_model(
    args: SimpleNamespace,
    model: nn.Module,
    dataset: Any,
    reference_model: Any,
    is_test: bool = True,
    show: bool = True,
) -> dict[str, Any]:
    """Score held-out pairs, keep a test's numbers, and show them or single pairs."""
    sharing = setup.find_sharing(args, model, reference_model)
    if sharing.warning and not args.train:
        rprint(sharing.warning)
    settings = setup.training_args(args, sharing.grade)
    metrics, scored = evaluate.score_pairs(
        model, reference_model, dataset, settings, args.test_batches
    )
    if args.test and args.adapter_path:
        data, longest = str(args.hf_dataset or args.data), args.max_seq_length
        metrics |= evaluate.keep_test(
            args.adapter_path,
            metrics,
            dataset,
            scored,
            {"test/data": data, "test/max_seq_length": longest},
            ordinary_text=args.retain_data is not None,
            pair_texts=args.report,
        )
    if args.test and show:
        before = "start" if isinstance(reference_model, FrozenStart) else "reference"
        evaluate.show_metrics({"policy": metrics}, before, settings.objective.noun)
    if args.inspect:
        again = copy.copy(args)
        # More tokens than any row has.
        again.max_seq_length, again.token_cache = 2**30, False
        if is_test:
            again.train, again.test = False, True
        read_uncut = partial(setup.load_data, again, dataset.tokenizer)
        show_pairs(dataset, scored, args.inspect, read_uncut)
    return metrics


def _compare(args):
    """Test finished runs on one test set, and print one table."""
    runs = {run.adapter_path: run for run in finished_runs(args)}
    sets: dict[tuple, Any] = {}

    def test(folder):
        run = runs[folder]
        rprint(f"Loading {run.model} with {folder}")
        model, tokenizer, reference_model = _load_models(run)
        # What only the loss reads; but rows without a usable number are left out.
        columns = (run.weight_feature, run.margin_feature)
        if columns not in sets:
            _, _, sets[columns] = setup.load_data(run, tokenizer)
            for line in sets[columns].summary():
                rprint(line)
            evaluate.check_same_pairs(folder, sets[columns], next(iter(sets.values())))
            models.check_token_ids(model, sets[columns].largest_token())
        reference = _load_trained(run, model, tokenizer, reference_model)
        models.read_weights(model, run.model)
        _start_together(run, partial(setup.tested, model, reference, sets[columns]))
        return evaluate_model(run, model, sets[columns], reference, show=False)

    results = [test(folder) for folder in runs]
    first = next(iter(runs.values()))
    starts = {(run.reference_model, run.resume_adapter_file) for run in runs.values()}
    before = "reference" if first.reference_model else "start"
    if len(starts) > 1:
        before = None
        rprint("The runs have different references: rewards and KL are from each own.")
    table = dict(zip(short_names(list(runs)), results))
    evaluate.show_metrics(table, before, objective_of(first).noun)
    for folder in runs if args.report else []:
        show_report(folder)


def _load_models(args):
    """Load the model, its tokenizer, and the reference model if one is named."""
    model, tokenizer = models.load_model(args.model, args.trust_remote_code)
    fit_to_model(args, model)
    reference_model = models.load_reference_model(
        args.reference_model, tokenizer, args.trust_remote_code
    )
    return model, tokenizer, reference_model


def _scored_text(args, model, tokenizer, start=True):
    """Score ordinary text before and after what happens inside."""
    given = (args.retain_data, args.model, args.max_seq_length, args.adapter_path)
    return scored_text(model, tokenizer, *given, start=start)


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
        mlx_lm.preference.errors.InputError: If a setting or the data is unusable.

    Example:
        >>> run(resolve_args(["--data", "pairs"]))
        Traceback (most recent call last):
        ...
        mlx_lm.preference.errors.InputError: Must provide at least one of --train or --test
    """
    given = {k: v for k, v in vars(args).items() if v is not None}
    if "explicit" not in given:
        given["explicit"] = {k for k in given if given[k] != CONFIG_DEFAULTS.get(k)}
    args = SimpleNamespace(**{**CONFIG_DEFAULTS, **given})
    check_keys(vars(args), [*CONFIG_DEFAULTS, *UNUSED_KEYS, "explicit"])
    given = args.hf_dataset
    args.hf_dataset, secrets = without_secrets(given)
    if secrets:
        args.secrets = given
        rprint(
            f"Not saved: {', '.join(secrets)} of hf_dataset. To resume, give it again, "
            "or log in to the Hugging Face Hub."
        )
    if isinstance(args.adapter_path, list):
        _compare(args)
        return
    settle(args)
    writes = args.train and not args.dry_run and mx.distributed.init().rank() == 0
    with folder_kept(args.adapter_path) if writes else nullcontext():
        _run(args, training_callback)


def _run(args, training_callback):
    """Load what the settings name, then train, test, or both."""
    np.random.seed(args.seed)
    if args.mask_prompt:
        rprint("mask_prompt has no effect: preference losses never score prompts.")
    if (notice := slow_blas_notice()) is not None:
        rprint(f"[WARNING] {notice}")

    rprint("Loading pretrained model")
    model, tokenizer, reference_model = _load_models(args)
    if (notice := slow_dtype_notice(model)) is not None:
        rprint(f"[WARNING] {notice}")

    rprint("Loading datasets")
    train_set, valid_set, test_set = setup.load_data(args, tokenizer)
    if args.inspect and not (test_set or valid_set):
        raise InputError(
            "inspect shows held-out pairs, and there are none: add a test or validation "
            "set, raise valid_fraction, or leave it out."
        )
    sets = [dataset for dataset in (train_set, valid_set, test_set) if dataset]
    models.check_token_ids(model, max(dataset.largest_token() for dataset in sets))
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
    else:
        reference = _load_trained(args, model, tokenizer, reference_model)
    if args.test or args.inspect:
        held_out = test_set or valid_set
        if not args.train:
            settings = setup.training_args(args, setup.likely_sharing(args))
            check_test_memory(model, reference, held_out, settings)
        models.read_weights(model, args.model)
        _start_together(args, partial(setup.tested, model, reference, held_out))
        evaluate_model(args, model, held_out, reference, is_test=bool(test_set))
    if args.report:
        show_report(args.adapter_path)


def _load_trained(args, model, tokenizer, reference_model):
    """Load what a run trained, if there is any, and return the reference."""
    reference = reference_model or model
    if args.adapter_path:
        setup.make_policy(args, model)
        reference = reference_model or FrozenStart(model)
    with _scored_text(args, model, tokenizer, start=bool(args.adapter_path)):
        if args.adapter_path:
            models.load_weights(model, Path(args.adapter_path) / "adapters.safetensors")
    return reference


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
    prepare_backend(user_cache_folder("kernels"))
    before = signal.getsignal(signal.SIGTERM)
    if mx.distributed.init().size() > 1:
        signal.signal(signal.SIGTERM, _terminated)
    try:
        with lasting_output():
            _main()
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number, frame):
    """Say what a launcher's signal may mean; while training, others listen."""
    text = (
        "stopped by SIGTERM while nothing was trained. Rank lost, if nobody sent it: a "
        "launcher so ends the others."
    )
    is_first = mx.distributed.init().rank() == 0
    sys.exit(_one_line(text, 128 + number) if is_first else 128 + number)


def _main():
    """The command, with one line for what a user can mend."""
    # A collection would look at all that was imported, a step of a GPU long.
    gc.freeze()
    args = None
    try:
        args = resolve_args()
        run(args)
    except KeyboardInterrupt:
        sys.exit(_one_line("interrupted.", 130))
    except Exception as e:
        # Ranks that are ready wait for this one, whatever happened to it.
        is_lost = is_lost_rank(e)
        is_ours = is_lost or start_together(failed=True)
        is_bug = not (is_lost or isinstance(e, (InputError, TrainingStopped)))
        if is_bug or os.environ.get("MLX_LM_DEBUG"):
            raise
        code, text = 2 if isinstance(e, InputError) else 1, str(e)
        if is_lost:
            text = "Rank lost: another process of this run has ended."
            if args is not None and (args.train or args.resume):
                text += f" Go on with: --resume {args.resume or args.adapter_path}"
        sys.exit(_one_line(text, code) if is_ours else code)


def _one_line(error, code):
    print(f"Error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
