# Copyright © 2026 MLX Contributors

"""Writing what was trained, completely or not at all."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .atomic_files import replace_file, writing


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """
    Write the trainable parameters, completely or not at all.

    Args:
        model (nn.Module): The trained model.
        path (str or Path): A ``.safetensors`` file, replaced in one step.

    Raises:
        OSError: If it can't be written; an old file stays.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(nn.Linear(1, 1), f"{folder}/adapters.safetensors")
        ...     sorted(mx.load(f"{folder}/adapters.safetensors"))
        ['bias', 'weight']
    """
    weights = dict(sorted(tree_flatten(model.trainable_parameters())))
    with writing(path):
        replace_file(path, lambda name: mx.save_safetensors(name, weights))
