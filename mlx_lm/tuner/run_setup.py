# Copyright © 2026 MLX Contributors

"""What a run is made of, found or built before its first step."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim

from ..cli_ui import rprint
from .atomic_files import remove_leftovers, user_cache_folder
from .batch_shape import (
    Bucket,
    batches_per_epoch,
    needed_tokens,
    padded_tokens,
    pair_lengths,
)
from .fingerprint import model_fingerprint, variant_fingerprint
from .length_buckets import LAYOUTS
from .memory_plan import MemoryEstimate
from .objective import Objective, objective_of
from .optimizers import build_optimizer
from .policy import adapter_config, load_model
from .reference import FrozenStart, check_same_tokens
from .reference_cache import ReferenceCache
from .remembered_reference import NoReference, RememberedReference
from .resume import check_identity, data_fingerprint
from .run_plan import describe_memory
from .schedules import build_learning_rate
from .sharing import Sharing, check_packing, check_sharing
from .training_state import TrainingState, newest_state


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
        >>> from mlx_lm.dpo import resolve_args
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
        >>> from mlx_lm.dpo import resolve_args
        >>> args = resolve_args(["--no-reference-cache"])
        >>> pairs = [([1], [2], [3], (1, 2, 2))]
        >>> remember_reference(args, nn.Linear(1, 1), None, pairs).model is not None
        True
    """
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
    reference.release(*datasets)
    return reference


def run_identity(
    model: nn.Module,
    reference_model: nn.Module | None,
    reference: RememberedReference,
    train_set: Any,
    valid_set: Any,
) -> dict[str, str]:
    """
    The fingerprints of what a run starts with, before a checkpoint is loaded.

    Args:
        model (nn.Module): The policy, as it starts.
        reference_model (nn.Module, optional): A separate reference model.
        reference (RememberedReference): What ``remember_reference`` returned.
        train_set (PreferenceDataset): The pairs.
        valid_set (PreferenceDataset): Held-out pairs, may be empty.

    Returns:
        dict: Fingerprints, see ``check_identity``.

    Example:
        >>> from mlx_lm.dpo import resolve_args
        >>> args = resolve_args(["--no-reference-cache"])
        >>> pairs, layer = [([1], [2], [3], (1, 2, 2))], nn.Linear(1, 1)
        >>> reference = remember_reference(args, layer, None, pairs)
        >>> identity = run_identity(layer, None, reference, pairs, [])
        >>> identity["model"] == identity["reference"]
        True
    """
    start = reference.cache.fingerprint
    if reference_model is not None or isinstance(reference, NoReference):
        start = model_fingerprint(model)
    return {
        "model": start,
        "reference": reference.cache.fingerprint,
        "train": data_fingerprint(train_set),
        "valid": data_fingerprint(valid_set),
    }


def make_optimizer(
    args: SimpleNamespace, pairs: int
) -> tuple[optim.Optimizer, list[str]]:
    """
    Make the optimizer, its schedule as long as the run.

    Args:
        args (SimpleNamespace): The run's settings; ``epochs`` decides ``iters``.
        pairs (int): How many there are to train on.

    Returns:
        tuple: The optimizer, and lines for the user.

    Example:
        >>> from mlx_lm.dpo import resolve_args
        >>> args = resolve_args(["--learning-rate", "0.5"])
        >>> make_optimizer(args, 8)[0].learning_rate.item()
        0.5
    """
    if args.epochs is not None:
        # However the pairs are put into buckets, only one batch is short.
        args.iters = args.epochs * -(-pairs // args.batch_size)
    updates = -(-args.iters // args.grad_accumulation_steps)
    rate, notices = build_learning_rate(
        args.learning_rate, updates, args.lr_schedule, args.warmup_steps
    )
    return build_optimizer(args.optimizer, rate, args.optimizer_config), notices


def find_sharing(
    args: SimpleNamespace, model: nn.Module, reference_model: Any
) -> Sharing:
    """
    Share or pack as the settings ask for, as far as policy and reference can.

    Args:
        args (SimpleNamespace): For ``share_prompt``, ``pack``, ``max_seq_length``.
        model (nn.Module): The policy.
        reference_model: Another model, or nothing that has to be asked.

    Returns:
        Sharing: The grade for ``plan_batches``, and a line for the user.

    Raises:
        ValueError: If rows are to be packed and a model can't.

    Example:
        >>> find_sharing.__name__  # see check_sharing
        'find_sharing'
    """
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


def likely_sharing(args: SimpleNamespace) -> str:
    """
    What ``find_sharing`` will find, as far as the settings tell.

    Args:
        args (SimpleNamespace): For ``share_prompt`` and ``pack``.

    Returns:
        str: A grade for ``plan_batches``.

    Example:
        >>> likely_sharing(SimpleNamespace(pack=False, share_prompt=True))
        'equal'
    """
    if args.pack:
        return "packed"
    # Every family but one in a hundred can, and asking would allocate the model.
    return "equal" if args.share_prompt else "plain"


def find_checkpoint(
    args: SimpleNamespace, identity: dict[str, str]
) -> TrainingState | None:
    """
    Find the state to go on with, and say from where.

    Args:
        args (SimpleNamespace): For ``adapter_path``, ``iters``, ``resume_anyway``.
        identity (dict): Fingerprints, see ``check_identity``.

    Returns:
        TrainingState: None if the run has not got as far as a checkpoint.

    Raises:
        ValueError: If the checkpoint is of another run.

    Example:
        >>> import contextlib, io
        >>> with contextlib.redirect_stdout(io.StringIO()):
        ...     state = find_checkpoint(SimpleNamespace(adapter_path="nowhere"), {})
        >>> state is None
        True
    """
    state = newest_state(args.adapter_path)
    if state is None:
        rprint(f"{args.adapter_path} has no checkpoint yet: the run starts again.")
        return None
    check_identity(state, identity, args)
    if state.iteration > args.iters:
        rprint(
            f"The run in {args.adapter_path} has already taken {state.iteration:,} "
            f"steps, more than the {args.iters:,} asked for: it takes no more. To "
            "train on, give a larger --iters."
        )
        return state
    if state.iteration == args.iters and not state.info["pending"]:
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


def header_rows(
    args: SimpleNamespace,
    train_set: Any,
    valid_set: Any,
    reference: RememberedReference,
    plan: list[Bucket],
    estimate: MemoryEstimate,
) -> list[tuple[str, str]]:
    """
    What the run's header says about data, batches, reference and memory.

    Args:
        args (SimpleNamespace): The run's settings.
        train_set (PreferenceDataset): The pairs.
        valid_set (PreferenceDataset): Held-out pairs, may be empty.
        reference (RememberedReference): The reference.
        plan (list): What ``training_plan`` returned.
        estimate (MemoryEstimate): What ``check_memory`` returned.

    Returns:
        list: Labels and texts.

    Example:
        >>> header_rows.__name__  # see print_dpo_run_header
        'header_rows'
    """
    per_epoch = batches_per_epoch(plan, args.batch_size)
    what = objective_of(args).noun
    lengths = pair_lengths(train_set)
    needed = needed_tokens(plan, lengths)
    padding = 1 - needed / padded_tokens(plan, args.batch_size, lengths)
    shared = "shared" if any(b.shape.prompt for b in plan) else "not shared"
    shared += ", rows packed" if args.pack else ""
    shapes = f"{len(plan)} batch shape{'s' if len(plan) > 1 else ''}"
    modifiers = _modifiers(args)
    rows = [
        *([("loss has", modifiers)] if modifiers else []),
        ("data", str(args.hf_dataset or args.data)),
        (what, f"{len(train_set):,} train · {len(valid_set):,} valid"),
        ("an epoch", f"{per_epoch:,} iters · {args.iters / per_epoch:.3g} epochs"),
        ("rows are", f"{train_set.shape} · {train_set.format}"),
        ("prompts", f"{shared} · {shapes} · {padding:.0%} padding"),
        ("reference", _reference_name(args, train_set, reference, what)),
        ("peak memory", describe_memory(estimate)),
    ]
    return [(label, text.replace("[", r"\[")) for label, text in rows]


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
    given = {f.name: getattr(objective, f.name) for f in fields(objective)}
    changed = {
        name: value
        for name, value in given.items()
        if name not in ("loss_type", "beta") and value != getattr(Objective, name)
    }
    columns = {k: getattr(args, k) for k in ("weight_feature", "margin_feature")}
    changed |= {name: value for name, value in columns.items() if value}
    return " · ".join(
        name if value is True else f"{name} {value}" for name, value in changed.items()
    )
