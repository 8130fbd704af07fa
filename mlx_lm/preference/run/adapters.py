# Copyright © 2026 MLX Contributors

"""What a run has trained, in its folder."""

import filecmp
import shutil
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..files import replace_file, writing


def numbered(folder: str | Path, iteration: int, name: str) -> Path:
    """The path of a checkpoint's file."""
    return Path(folder) / f"{iteration:07d}_{name}.safetensors"


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write the trainable parameters, completely or not at all."""
    weights = dict(sorted(tree_flatten(model.trainable_parameters())))
    with writing(path):
        replace_file(path, lambda name: mx.save_safetensors(name, weights))


def copy_adapter(source: Path, target: str | Path) -> None:
    """Copy an adapter, completely or not at all, unless it is there."""
    target = Path(target)
    if not target.is_file() or not filecmp.cmp(source, target, shallow=False):
        with writing(target):
            replace_file(target, partial(shutil.copyfile, source))
