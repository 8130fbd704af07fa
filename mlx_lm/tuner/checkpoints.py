# Copyright © 2026 MLX Contributors

"""Writing what was trained, completely or not at all."""

import os
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """
    Write the trainable parameters, completely or not at all.

    Args:
        model (nn.Module): The trained model.
        path (str or Path): A ``.safetensors`` file, replaced in one step.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(nn.Linear(1, 1), f"{folder}/adapters.safetensors")
        ...     sorted(mx.load(f"{folder}/adapters.safetensors"))
        ['bias', 'weight']
    """
    path = Path(path)
    weights = dict(sorted(tree_flatten(model.trainable_parameters())))
    temporary = path.with_name(f".{path.stem}.tmp.safetensors")
    try:
        mx.save_safetensors(str(temporary), weights)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
