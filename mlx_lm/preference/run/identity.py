# Copyright © 2026 MLX Contributors

"""What must be the same for a run to go on, and on every rank."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..digest import digest
from ..reference.fingerprint import model_fingerprint
from ..reference.live import LiveReference, NoReference
from .checkpoint import TrainingState, data_fingerprint


def run_identity(
    model: nn.Module,
    reference_model: nn.Module | None,
    reference: LiveReference,
    train_set: Any,
    valid_set: Any,
) -> dict[str, str]:
    """The fingerprints of what a run starts with, before a checkpoint is loaded."""
    start = reference.fingerprint
    if reference_model is not None or isinstance(reference, NoReference):
        start = model_fingerprint(model)
    sets = {"train": data_fingerprint(train_set), "valid": data_fingerprint(valid_set)}
    return {"model": start, "reference": reference.fingerprint, **sets}


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
