# Copyright © 2026 MLX Contributors

"""Trained weights of a file, for a policy that has the same trained part."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import InputError
from .adapter import OTHERS, read_tensors


def fitting_weights(model: nn.Module, path: str | Path) -> dict[str, mx.array]:
    """The trained weights of a file, all of which a prepared model has, and no more."""
    trainable = dict(tree_flatten(model.trainable_parameters()))
    if not Path(path).is_file():
        raise InputError(f"The adapter file {path} does not exist, or is no file.")
    weights = read_tensors(path)
    check = "Check fine_tune_type, num_layers and lora_parameters.keys."
    ranks = "Check lora_parameters.rank."
    for other in OTHERS:
        if theirs := other.weights(weights, path, trainable):
            weights, check = theirs, "Is it an adapter of this model?"
            ranks = check
    for name, w in weights.items():
        if name not in trainable:
            raise InputError(
                f"{path} does not fit: tensor {name!r} is not trained here. {check}"
            )
        if w.shape != trainable[name].shape:
            raise InputError(
                f"{path} does not fit: tensor {name!r} has shape {w.shape}, the "
                f"model's is {trainable[name].shape}. {ranks}"
            )
        is_float = mx.issubdtype(w.dtype, mx.floating)
        if not is_float or not mx.isfinite(w).all().item():
            what = "numbers that are not finite" if is_float else f"{w.dtype}"
            raise InputError(
                f"{path} can't be used: tensor {name!r} has {what}. Copy it again, or "
                "take another checkpoint."
            )
    if missing := sorted(trainable.keys() - weights.keys()):
        raise InputError(
            f"{path} does not fit: it has no tensor {missing[0]!r}, which is trained "
            f"here. {check}"
        )
    return weights


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load trained weights into a prepared model, and drop none of them."""
    model.load_weights(list(fitting_weights(model, path).items()), strict=False)
