# Copyright © 2026 MLX Contributors

"""A run in progress to a checkpoint's arrays and numbers, and back."""

from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .master_weights import MasterWeights
from .policy import load_weights
from .preference_metrics import SUMS
from .ranks import sum_over_ranks
from .training_state import TrainingState

if TYPE_CHECKING:
    from .preference_run import PreferenceRun


def _with_prefix(prefix, tree):
    return {f"{prefix}.{k}": v for k, v in tree_flatten(tree)}


def _fill(tree, arrays, path):
    """Put saved arrays into a tree, in place: compiled steps hold on to it."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        name = f"{path}.{key}"
        if isinstance(tree[key], (dict, list)):
            _fill(tree[key], arrays, name)
        elif name not in arrays:
            raise ValueError(f"The checkpoint has no {name}: it is of another run.")
        else:
            tree[key] = arrays[name]


def take_snapshot(
    run: "PreferenceRun", pending: bool
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """
    Collect all of a run that a later process can't compute again.

    All ranks call it together.

    Args:
        run (PreferenceRun): The run, between two steps.
        pending (bool): Whether a validation is still to be done.

    Returns:
        tuple: Arrays by name, and what JSON can hold.

    Example:
        >>> take_snapshot.__name__  # see tests/test_resume.py
        'take_snapshot'
    """
    run.reference.cache.exchange(run.world)
    # What ranks hold apart is summed: any number of them can go on with it.
    window = run.window.sums or {}
    if run.world.size() > 1:
        # A rank whose every step was skipped has nothing but names.
        window = window or dict.fromkeys(SUMS, mx.array(0.0))
    apart = _with_prefix("accumulator", run.state[3]) | _with_prefix("window", window)
    counts = run.window.counts()
    if run.world.size() > 1:
        tokens = {k: mx.array(float(counts[k])) for k in ("real", "padded")}
        apart = sum_over_ranks(apart | tokens, run.world)
        counts |= {k: int(apart.pop(k).item()) for k in tokens}
    arrays = {
        **_with_prefix("optimizer", run.optimizer.state),
        **apart,
        **_with_prefix("reference", run.reference.cache.arrays()),
        "grad_norm": run.grad_norm,
    }
    if run.args.sync_reference:
        arrays |= _with_prefix("moved", run.reference.model.arrays())
    metrics = run.folder / "metrics.jsonl"
    info = {
        "pending": pending,
        "window": counts,
        "skipped": run.skipped,
        "skipped_in_a_row": run.skipped_in_a_row,
        "best": run.best,
        "gradients": run.describe_gradients(),
        "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
        "identity": run.identity,
    }
    return arrays, info


def apply_snapshot(run: "PreferenceRun", state: TrainingState) -> tuple[int, bool]:
    """
    Make a new run what the one was that wrote a checkpoint.

    Args:
        run (PreferenceRun): The run, before its first step.
        state (TrainingState): The checkpoint.

    Returns:
        tuple: Steps that were done, and whether their validation is missing.

    Raises:
        ValueError: If the checkpoint is of another run.

    Example:
        >>> apply_snapshot.__name__  # see tests/test_resume.py
        'apply_snapshot'
    """
    arrays, info = state.arrays, state.info
    load_weights(run.policy_model, state.adapter)
    inner: Any = getattr(run.optimizer, "_optimizer", run.optimizer)
    rate = inner.state.get("learning_rate")
    _fill(run.optimizer.state, arrays, "optimizer")
    # A constant rate may have been changed by the user.
    if rate is not None and "learning_rate" not in inner._schedulers:
        inner.state["learning_rate"] = rate
    if isinstance(run.optimizer, MasterWeights):
        mx.eval(run.optimizer.state)
    # The sums of all ranks go on in the first one.
    if run.rank == 0:
        if any(name.startswith("accumulator.") for name in arrays):
            _fill(run.state[3], arrays, "accumulator")
        sums = {
            name.removeprefix("window."): x
            for name, x in arrays.items()
            if name.startswith("window.")
        }
        run.window.restore(info["window"], sums)
    if run.args.sync_reference:
        prefix = "moved."
        run.reference.model.restore(
            {k.removeprefix(prefix): v for k, v in arrays.items() if prefix in k[:6]}
        )
    # Of another reference they would be wrong.
    if info["identity"].get("reference") == run.identity.get("reference"):
        run.reference.cache.absorb(arrays["reference.keys"], arrays["reference.logps"])
    run.grad_norm = arrays["grad_norm"]
    run.skipped, run.best = info["skipped"], info["best"]
    run.gradients = info["gradients"]
    run.skipped_in_a_row = info["skipped_in_a_row"]
    run.saved = state.iteration
    run.ui.start_at(state.iteration)
    return state.iteration, info["pending"]
