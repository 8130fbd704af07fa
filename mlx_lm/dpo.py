# Copyright © 2026 MLX Contributors

import gc
import os
import signal
import sys
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from . import lora
from .preference.batch.collate import check_enough
from .preference.device import prepare_backend
from .preference.errors import InputError
from .preference.features import around, features
from .preference.files import user_cache_folder
from .preference.policy import model as models
from .preference.ranks import join_ranks
from .preference.run import setup
from .preference.run.folder import check_folder, open_folder
from .preference.run.job import Job
from .preference.run.loop import TrainingStopped
from .preference.run.plan import describe_plan, training_plan
from .preference.run.screen import print_header
from .preference.settings.begin import load_models, settle
from .preference.settings.checks import check_keys, check_types
from .preference.settings.parser import build_parser, read_config
from .preference.settings.table import CONFIG_DEFAULTS, DEFAULTS, UNUSED_KEYS
from .preference.terminal import lasting_output, rprint, visible
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
    if config_file := given.get("config"):
        rprint("Loading configuration file", config_file)
        config = read_config(config_file, lora.yaml_loader)
        check_keys(config, [*CONFIG_DEFAULTS, *UNUSED_KEYS])
        if "iters" in given:
            config.pop("epochs", None)  # Both say how long; the command line wins.
        given = {k: v for k, v in config.items() if v is not None} | given
    folders = given.get("adapter_path")
    if isinstance(folders, list) and len(folders) < 2:
        given["adapter_path"] = folders[0] if folders else ""
    explicit = set(given) - {"config"}
    return SimpleNamespace(**{**DEFAULTS, **given}, explicit=explicit)


def train_model(job: Job, training_callback: TrainingCallback | None = None) -> None:
    """Train the policy and write the adapter, its settings and its metrics."""
    args, model, train_set = job.args, job.model, job.train_set
    check_enough(train_set, args.batch_size)
    setup.make_policy(args, model)
    job.optimizer, _ = setup.make_optimizer(args, len(train_set))
    job.settings = setup.training_args(args)
    for feature in features():
        feature.before_weights(job)
    models.read_weights(model, args.model)
    if job.reference_model is not None:
        path = args.reference_model or args.model
        models.read_weights(job.reference_model, path)
    job.reference = setup.make_reference(args, model, job.reference_model)
    for feature in features():
        feature.after_weights(job)
    # Where all its numbers are known, nothing else holds it.
    job.reference_model = None
    optimizer, notices = setup.make_optimizer(args, len(train_set), job.state)
    job.optimizer = optimizer
    is_first = mx.distributed.init().rank() == 0
    if is_first:
        _announce(job)
    # Whatever any rank refuses, nothing of an earlier run is touched until here.
    for feature in features():
        feature.agree(job)
    if args.dry_run:
        return
    if is_first:
        training_callback = open_folder(job, training_callback)
    for notice in notices:
        rprint(notice)
    print_trainable_parameters(model)
    with around("around_training", job):
        train_dpo(
            model,
            optimizer,
            train_set,
            job.valid_set or None,
            job.settings,
            job.reference,
            training_callback,
            resume=job.state,
            identity=job.identity,
        )
    for feature in features():
        feature.after_training(job)


def _announce(job):
    """Say what the run will be, and refuse what could not be written."""
    args = job.args
    plan = training_plan(job.train_set, job.settings)
    rows = setup.header_rows(args, job.train_set, job.valid_set, plan)
    for feature in features():
        feature.header_rows(job, rows)
    print_header("mlx_lm.dpo", [(label, text) for label, text in rows.items() if text])
    for line in job.lines:
        rprint(line)
    for line in describe_plan(plan, args.batch_size) if args.dry_run else []:
        rprint(line)
    for feature in features():
        feature.before_folder(job)
    check_folder(args.adapter_path)


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
    named = [k for k, v in given.items() if k not in DEFAULTS or v != DEFAULTS[k]]
    check_keys(named, [*CONFIG_DEFAULTS, *UNUSED_KEYS, "explicit"])
    args = SimpleNamespace(**{**DEFAULTS, **given})
    check_types(vars(args))
    for feature in features():
        feature.begin(args)
    if any(feature.takes_over(args) for feature in features()):
        return
    settle(args)
    with around("around_command", args):
        _run(args, training_callback)


def _run(args, training_callback):
    """Load what the settings name, then train, and do what else they ask for."""
    np.random.seed(args.seed)
    if args.mask_prompt:
        rprint("mask_prompt has no effect: preference losses never score prompts.")
    rprint("Loading pretrained model")
    model, tokenizer, reference_model = load_models(args)
    job = Job(args, model, tokenizer, reference_model=reference_model)
    del reference_model
    rprint("Loading datasets")
    job.train_set, job.valid_set, job.test_set = setup.load_data(args, job.tokenizer)
    for feature in features():
        feature.after_loading(job)
    setup.introduce(job)
    if args.train:
        train_model(job, training_callback)
        if args.dry_run:
            rprint("Dry run: nothing was trained.")
            return
        rprint(f"Saved the adapter to {args.adapter_path}")
    for feature in features():
        feature.finish(job)


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
    before: Any = signal.getsignal(signal.SIGTERM)
    try:
        world = join_ranks()
    except InputError as e:
        sys.exit(_one_line(e, 2))
    if world.size() > 1:
        signal.signal(signal.SIGTERM, _terminated)
    try:
        with lasting_output():
            _main()
    except SystemExit:
        if world.size() > 1:
            # A launcher ends all when one has ended: this one's code is known already.
            before = signal.SIG_IGN
        raise
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
        said: Exception | None = e
        for feature in features():
            said = said and feature.failed(said, args)
        known = isinstance(said or e, (InputError, TrainingStopped))
        if not known or os.environ.get("MLX_LM_DEBUG"):
            raise
        code = 2 if isinstance(said or e, InputError) else 1
        sys.exit(_one_line(said, code) if said else code)


def _one_line(error, code):
    print(f"Error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
