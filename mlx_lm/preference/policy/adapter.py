# Copyright © 2026 MLX Contributors

"""What lies in an adapter's folder."""

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import InputError
from ..files import read_plain
from ..plug_ins import load

ADAPTER, PEFT_ADAPTER = "adapters.safetensors", "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Who knows the adapters of another library, as ``peft.PeftAdapters`` does.
OTHERS: list[Any] = []


def adapter_file(path: str | Path) -> Path:
    """The file of an adapter's weights, which may be given by its folder."""
    path = Path(path)
    if path.is_dir():
        names = (ADAPTER, PEFT_ADAPTER, "adapter_model.bin")
        found = [path / name for name in names if (path / name).exists()]
        path = (found or [path / ADAPTER])[0]
    if path.suffix in _PICKLES and path.exists():
        raise InputError(
            f"{path} is a pickle, which may run code when it is read and is never "
            "loaded: save the adapter again with save_pretrained, as .safetensors."
        )
    return path


def adapter_config(path: str | Path) -> dict | None:
    """Read the configuration that lies beside an adapter file."""
    path = Path(path)
    path = (path if path.is_dir() else path.parent) / CONFIG
    if not os.path.lexists(path):
        return None
    try:
        config = json.loads(read_plain(path))
    except (OSError, ValueError, RecursionError) as e:
        reason = getattr(e, "strerror", None) or e
        raise InputError(f"{path} is damaged: {reason}. Copy it again.") from e
    if not isinstance(config, dict):
        raise InputError(f"{path} is no configuration: it must hold keys and values.")
    return config


def read_tensors(path: str | Path) -> dict[str, mx.array]:
    """The tensors of an adapter's file."""
    try:
        tensors = mx.load(str(path))
        if not isinstance(tensors, dict):
            raise ValueError("it holds one array, without a name")
        # Else a file that was cut off would be found out later.
        mx.eval(tensors)
        return tensors
    except (RuntimeError, ValueError) as e:
        raise InputError(f"Can't read the adapter file {path}: {e}") from e


# Each adds to the list.
PLUG_INS = ("peft",)
load(__package__, PLUG_INS)
