# Copyright © 2026 MLX Contributors

"""What a run is made of, found or built before its first step."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from ...tuner.datasets import load_preference_dataset
from ...tuner.trainer import DPOTrainingArgs
from ..batch import shape
from ..batch.buckets import LAYOUTS
from ..data.options import RowOptions
from ..data.render import fix_date
from ..digest import digest
from ..errors import InputError
from ..files import remove_leftovers, user_cache_folder
from ..forward.frozen import FrozenStart
from ..forward.probe import Sharing, check_packing, check_sharing
from ..memory.predict import MemoryEstimate
from ..objective.objective import objective_of
from ..policy.model import prepare_policy
from ..policy.optimizer import build_learning_rate, build_optimizer
from ..reference.cache import ReferenceCache
from ..reference.fingerprint import model_fingerprint, variant_fingerprint
from ..reference.remembered import NoReference, RememberedReference
from ..terminal import rprint
from .checkpoint import TrainingState, check_identity, data_fingerprint, newest_state
from .folder import adapter_config
from .forecast import describe_memory


def make_policy(args: SimpleNamespace, model: nn.Module) -> None:
    """Make the trained part of the model as the settings say."""
    prepare_policy(
        model,
        args.fine_tune_type,
        args.num_layers,
        args.lora_parameters,
        train_head=args.train_head,
        start=args.resume_adapter_file,
        seed=args.seed,
    )


def load_data(args: SimpleNamespace, tokenizer: Any) -> tuple:
    """Load the sets that the settings ask for: train, valid, test."""
    # A run that goes on, or is tested, another day has the date of its start.
    args.template_date = fix_date(tokenizer, args.template_date)
    objective = objective_of(args)
    return load_preference_dataset(
        getattr(args, "secrets", None) or args.hf_dataset or args.data,
        tokenizer,
        train=args.train,
        test=args.test,
        inspect=bool(args.inspect),
        kind=objective.data,
        mismatch=objective.compares_prompts,
        max_length=args.max_seq_length,
        data_dir=args.data_dir,
        valid_fraction=args.valid_fraction,
        seed=args.seed,
        token_cache=args.token_cache,
        **vars(RowOptions().updated(vars(args))),
    )


def remember_reference(
    args: SimpleNamespace,
    policy: nn.Module,
    reference_model: nn.Module | None,
    *datasets: Any,
) -> RememberedReference:
    """The run's reference, with what earlier runs found out about the same one."""
    objective = objective_of(args)
    if not objective.needs_reference:
        return NoReference(FrozenStart(policy) if args.test else None)
    folder = args.reference_cache
    if folder is not False:
        folder = Path(folder) if folder else user_cache_folder("references")
        remove_leftovers(folder)
    variant = f"ld_alpha={objective.ld_alpha}" if objective.ld_alpha < 1 else ""
    name = variant_fingerprint(model_fingerprint(reference_model or policy), variant)
    reference = RememberedReference(
        reference_model or FrozenStart(policy),
        ReferenceCache(folder or None, name),
        # The test compares both models' whole distributions.
        keep=bool(args.test or args.inspect),
        moving=args.sync_reference,
    )
    if datasets:
        reference.check(datasets[0], objective.ld_alpha)
    reference.release(*datasets)
    return reference


def run_identity(
    model: nn.Module,
    reference_model: nn.Module | None,
    reference: RememberedReference,
    train_set: Any,
    valid_set: Any,
) -> dict[str, str]:
    """The fingerprints of what a run starts with, before a checkpoint is loaded."""
    start = reference.cache.fingerprint
    if reference_model is not None or isinstance(reference, NoReference):
        start = model_fingerprint(model)
    sets = {"train": data_fingerprint(train_set), "valid": data_fingerprint(valid_set)}
    return {"model": start, "reference": reference.cache.fingerprint, **sets}


def rank_inputs(
    identity: dict[str, str], state: TrainingState | None = None
) -> dict[str, Any]:
    """What all ranks of a run must have loaded alike, by the names of it."""
    inputs: dict[str, Any] = {f"the {_LOADED[k]}": x for k, x in identity.items()}
    # Bytes alone tell: a copy may lack a part, or be of another day.
    folder = state and (state.iteration, state.info, state.arrays)
    weights = state and mx.load(str(state.adapter))
    return {**inputs, "the checkpoint": digest(folder, weights)}


def tested(model: nn.Module, reference: Any, dataset: Any) -> dict[str, Any]:
    """What all ranks of a test must have loaded alike."""
    before = {}
    if isinstance(reference, nn.Module) and reference is not model:
        before = {"reference": model_fingerprint(reference)}
    found = {"model": model_fingerprint(model), "test": data_fingerprint(dataset)}
    return rank_inputs(before | found)


_LOADED = {
    **{"model": "model's weights", "reference": "reference's weights"},
    **{"train": "training pairs", "valid": "validation pairs", "test": "test pairs"},
}


def make_optimizer(
    args: SimpleNamespace, pairs: int, state: TrainingState | None = None
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
    return build_optimizer(args.optimizer, rate, args.optimizer_config), notices


def find_sharing(
    args: SimpleNamespace, model: nn.Module, reference_model: Any
) -> Sharing:
    """Share or pack as the settings ask for, as far as policy and reference can."""
    # The reference runs on the same batches.
    models = [m for m in (model, reference_model) if isinstance(m, nn.Module)]
    if args.pack:
        return [check_packing(m, args.max_seq_length) for m in models][0]
    # Also finds out whether a model can be taken apart, shared or not.
    checked = [check_sharing(m) for m in models]
    grade, notice, _ = max(checked, key=lambda s: LAYOUTS.index(s.grade))
    warning = next((s.warning for s in checked if s.warning), "")
    if args.share_prompt is False:
        grade, notice = "plain", "" if grade == "plain" else notice
    return Sharing(grade, notice, warning)


def likely_sharing(args: SimpleNamespace) -> str:
    """What ``find_sharing`` will find, as far as the settings tell."""
    if args.pack:
        return "packed"
    # Every family but one in a hundred can, and asking would allocate the model.
    return "plain" if args.share_prompt is False else "equal"


def find_checkpoint(
    args: SimpleNamespace, identity: dict[str, str]
) -> TrainingState | None:
    """Find the state to go on with, and say from where."""
    try:
        state = newest_state(args.adapter_path)
    except InputError as e:
        if not args.restart:
            raise InputError(
                f"{e} Restore its files, or give --restart to begin again at step 0 and "
                "overwrite what is there."
            ) from e
        rprint(f"[WARNING] {e} The run begins again at step 0.")
        return None
    if state is None:
        rprint(f"{args.adapter_path} has no checkpoint yet: the run starts again.")
        return None
    check_identity(state, identity, args.adapter_path, args.resume_anyway)
    done, iters = state.iteration, args.iters
    if done > iters or (done == iters and not state.info["pending"]):
        how = f"is complete: it has taken all of its {done:,} steps."
        if done > iters:
            how = f"has already taken {done:,} steps, more than the {iters:,} asked "
            how += "for: it takes no more."
        train_on = "To train on, give a larger --iters."
        rprint(f"The run in {args.adapter_path} {how} {train_on}")
        return state
    since = state.info["parts"]["best"].get("since", 0)
    if 0 < (args.early_stopping or 0) <= since and not state.info["pending"]:
        rprint(
            f"The run in {args.adapter_path} stopped early after step {done:,}: it takes "
            "no more. To train on, give a larger --early-stopping."
        )
        return state
    rprint(f"Going on after step {done:,} of {iters:,}.")
    before = adapter_config(args.adapter_path) or {}
    if before.get("iters") not in (None, args.iters):
        rprint(
            f"The run has {args.iters:,} steps now instead of {before['iters']:,}: a "
            f"learning rate schedule ends at step {args.iters:,}."
        )
    return state


def training_args(args: SimpleNamespace, sharing: str = "plain") -> DPOTrainingArgs:
    """The part of the settings that the training loop needs."""
    names = {f.name: f.metadata.get("name", f.name) for f in fields(DPOTrainingArgs)}
    return DPOTrainingArgs(
        **{k: getattr(args, name) for k, name in names.items() if hasattr(args, name)},
        adapter_file=str(Path(args.adapter_path) / "adapters.safetensors"),
        sharing=sharing,
        try_layouts=args.share_prompt is None and not args.pack,
    )


def header_rows(
    args: SimpleNamespace,
    train_set: Any,
    valid_set: Any,
    reference: RememberedReference,
    plan: list[shape.Bucket],
    estimate: MemoryEstimate,
) -> list[tuple[str, str]]:
    """What the run's header says of settings, data, batches and memory."""
    per_epoch = shape.batches_per_epoch(plan, args.batch_size)
    what = objective_of(args).noun
    lengths = shape.pair_lengths(train_set)
    computed = shape.padded_tokens(plan, args.batch_size, lengths)
    padding = 1 - shape.needed_tokens(plan, lengths) / computed
    shared = "shared" if any(b.shape.prompt for b in plan) else "not shared"
    shared += ", rows packed" if args.pack else ""
    shapes = f"{len(plan)} batch shape{'s' if len(plan) > 1 else ''}"
    rows = [
        *_settings_rows(args),
        ("loss has", _modifiers(args)),
        ("data", str(args.hf_dataset or args.data)),
        (what, f"{len(train_set):,} train · {len(valid_set):,} valid"),
        ("an epoch", f"{per_epoch:,} iters · {args.iters / per_epoch:.3g} epochs"),
        ("rows are", f"{train_set.shape} · {train_set.format}"),
        ("columns", train_set.notes.read_as()),
        ("prompts", f"{shared} · {shapes} · {padding:.0%} padding"),
        ("reference", _reference_name(args, train_set, reference, what)),
        ("peak memory", describe_memory(estimate)),
    ]
    return [(label, text) for label, text in rows if text]


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
    return [
        ("model", str(args.model)),
        ("type", kind),
        ("loss", f"{losses} · beta {args.beta:g}"),
        ("optimizer", f"{args.optimizer} · {rate}"),
        ("batch · iters", f"{args.batch_size} · {args.iters:,}"),
        ("max seq", f"{args.max_seq_length:,}"),
    ]


def _reference_name(args, train_set, reference, what):
    if isinstance(reference, NoReference):
        return "none"
    start = "the start" if args.sync_reference else "the frozen start"
    if args.resume_adapter_file:
        start = args.resume_adapter_file + ("" if args.sync_reference else ", frozen")
    if args.sync_reference:
        return f"{start} · follows the policy every {args.sync_steps:,} updates"
    known = len(train_set) - reference.unknown(train_set)
    count = f" · {known:,} of {len(train_set):,} {what} known" if known else ""
    return (args.reference_model or start) + count


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
