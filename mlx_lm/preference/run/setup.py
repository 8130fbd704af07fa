# Copyright © 2026 MLX Contributors

"""What a run is made of, found or built before its first step."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim

from ...tuner.datasets import load_preference_dataset
from ...tuner.trainer import DPOTrainingArgs
from ..batch import shape
from ..data.options import RowOptions
from ..data.render import fix_date
from ..features import features
from ..forward.frozen import FrozenStart
from ..objective.objective import objective_of
from ..policy.model import check_token_ids, prepare_policy
from ..policy.optimizer import build_learning_rate, build_optimizer
from ..reference.live import LiveReference, NoReference
from ..terminal import counted, rprint
from .job import Job


def make_policy(args: SimpleNamespace, model: nn.Module) -> None:
    """Make the trained part of the model as the settings say."""
    given = args.fine_tune_type, args.num_layers, args.lora_parameters
    prepare_policy(model, *given, seed=args.seed)
    for feature in features():
        feature.policy_made(args, model)


def load_data(args: SimpleNamespace, tokenizer: Any) -> tuple:
    """Load the sets that the settings ask for: train, valid, test."""
    # A run that goes on, or is tested, another day has the date of its start.
    args.template_date = fix_date(tokenizer, args.template_date)
    objective = objective_of(args)
    given = vars(RowOptions().updated(vars(args))) | {"data": args.data}
    for feature in features():
        given |= feature.rows(args)
    return load_preference_dataset(
        tokenizer=tokenizer,
        train=args.train,
        kind=objective.data,
        mismatch=objective.compares_prompts,
        max_length=args.max_seq_length,
        data_dir=args.data_dir,
        valid_fraction=args.valid_fraction,
        seed=args.seed,
        **given,
    )


def introduce(job: Job) -> None:
    """Say what was read, and refuse what the model can't take."""
    sets = [x for x in (job.train_set, job.valid_set, job.test_set) if x]
    check_token_ids(job.model, max(x.largest_token() for x in sets))
    # A warning that holds for every set is said once.
    for line in dict.fromkeys(line for dataset in sets for line in dataset.summary()):
        rprint(line)
    if job.train_set:
        rprint(job.train_set.preview())


def make_reference(
    args: SimpleNamespace, policy: nn.Module, reference_model: nn.Module | None
) -> LiveReference:
    """The reference of a run, or of a test behind it."""
    if not objective_of(args).needs_reference:
        return NoReference(FrozenStart(policy) if args.test else None)
    return LiveReference(reference_model or FrozenStart(policy))


def make_optimizer(
    args: SimpleNamespace, pairs: int, state: Any = None
) -> tuple[optim.Optimizer, list[str]]:
    """Make the optimizer, its schedule as long as the run, or all it was and will be."""
    if args.epochs is not None:
        # However the pairs are put into buckets, only one batch is short.
        args.iters = args.epochs * -(-pairs // args.batch_size)
    batches = args.grad_accumulation_steps
    updates = -(-args.iters // batches)
    if state is not None:
        # A run that was shorter may have ended between two of today's updates.
        left = max(updates - state.iteration // batches, 0)
        updates = max(state.info["updates"] + left, 1)
    rate, notices = build_learning_rate(
        args.learning_rate, updates, args.lr_schedule, args.warmup_steps
    )
    optimizer = build_optimizer(args.optimizer, rate, args.optimizer_config)
    if getattr(optimizer, "relative_step", False):
        notices.append(
            "adafactor ignores learning_rate and schedules: its rates are its own, "
            "unless optimizer_config has adafactor: {relative_step: false}."
        )
    return optimizer, notices


def training_args(args: SimpleNamespace) -> DPOTrainingArgs:
    """The part of the settings that the training loop needs."""
    names = {f.name: f.metadata.get("name", f.name) for f in fields(DPOTrainingArgs)}
    return DPOTrainingArgs(
        **{k: getattr(args, name) for k, name in names.items() if hasattr(args, name)},
        adapter_file=str(Path(args.adapter_path) / "adapters.safetensors"),
    )


def header_rows(
    args: SimpleNamespace,
    train_set: Any,
    valid_set: Any,
    plan: list[shape.Bucket],
) -> dict[str, str]:
    """What the run's header says of settings, data and batches."""
    per_epoch = shape.batches_per_epoch(plan, args.batch_size)
    objective = objective_of(args)
    lengths = shape.pair_lengths(train_set)
    computed = shape.padded_tokens(plan, args.batch_size, lengths)
    padding = 1 - shape.needed_tokens(plan, lengths) / computed
    shared = "shared" if any(b.shape.prompt for b in plan) else "not shared"
    shared += ", rows packed" if any(b.shape.packed for b in plan) else ""
    shapes = counted(len(plan), "batch shape")
    epochs = args.iters / per_epoch
    passes = f"{epochs:,.0f}" if epochs >= 1000 else f"{epochs:.3g}"
    passes += " epoch" if passes == "1" else " epochs"
    read = getattr(train_set, "sample", None)
    return {
        **_settings_rows(args),
        "loss has": _modifiers(args),
        "data": str(args.data),
        "rows read": f"{read.rows:,} of {read.total:,}" if read else "",
        objective.noun: f"{len(train_set):,} train · {len(valid_set):,} valid",
        "an epoch": f"{counted(per_epoch, 'iter')} · {passes}",
        "rows are": f"{train_set.shape} · {train_set.format}",
        "columns": train_set.notes.read_as(),
        "prompts": f"{shared} · {shapes} · {padding:.0%} padding",
        "reference": "the frozen start" if objective.needs_reference else "none",
    }


def _settings_rows(args):
    layers = "all" if args.num_layers == -1 else args.num_layers
    kind = f"{args.fine_tune_type} · {layers} layers"
    if args.fine_tune_type != "full":
        kind += f" · rank {args.lora_parameters['rank']}"
    rate = f"lr {args.learning_rate:.1e}"
    if isinstance(args.lr_schedule, dict):
        # mlx-lm's own form brings its rates along.
        own = "arguments" in args.lr_schedule
        rate = args.lr_schedule["name"] if own else f"{rate} {args.lr_schedule['name']}"
    elif args.lr_schedule:
        rate = f"{rate} {args.lr_schedule}"
    losses = " + ".join(objective_of(args).losses)
    return {
        "model": str(args.model),
        "type": kind,
        "loss": f"{losses} · beta {args.beta:g}",
        "optimizer": f"{args.optimizer} · {rate}",
        "batch · iters": f"{args.batch_size} · {args.iters:,}",
        "max seq": f"{args.max_seq_length:,}",
    }


def _modifiers(args):
    """What is not as it is by default, beside the loss and beta."""
    objective = objective_of(args)
    shown = []
    for f in fields(objective):
        value = getattr(objective, f.name)
        if f.name not in ("loss_type", "beta") and value != f.default:
            shown.append(f.name if value is True else f"{f.name} {value}")
    for name in ("weight_feature", "margin_feature"):
        if value := getattr(args, name):
            shown.append(f"{name} {value}")
    return " · ".join(shown)
