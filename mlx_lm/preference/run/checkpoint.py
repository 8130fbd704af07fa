# Copyright © 2026 MLX Contributors

"""What a run needs to go on as if it had never stopped, in one file.

The weights are in the numbered adapter beside it, which is written first. Random
numbers and the order of the data are functions of the seed and the step, so they
need no state. Written last and in one step, a state is whole or not there.
"""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ...cli_ui import rprint
from ..errors import InputError
from ..files import replace_file, writing
from ..reference.cache import pair_key

VERSION = 1
# Older ones are only needed where the newest is damaged.
KEPT_STATES = 2


class TrainingState(NamedTuple):
    """A state read from a file."""

    iteration: int
    arrays: dict[str, mx.array]
    info: dict[str, Any]
    adapter: Path


def numbered(folder: str | Path, iteration: int, name: str) -> Path:
    """The path of a checkpoint's file."""
    return Path(folder) / f"{iteration:07d}_{name}.safetensors"


def _checksum(arrays, info):
    digest = hashlib.blake2b(json.dumps(info, sort_keys=True).encode(), digest_size=16)
    for name in sorted(arrays):
        x = arrays[name]
        digest.update(f"{name}{x.shape}{x.dtype}".encode())
        digest.update(
            np.array(x.reshape(-1).view(mx.uint8)).tobytes() if x.size else b""
        )
    return digest.hexdigest()


def save_state(
    folder: str | Path, iteration: int, arrays: dict[str, mx.array], info: dict
) -> Path:
    """Write a state, completely or not at all; its weights are already there."""
    path = numbered(folder, iteration, "state")
    arrays = {name: mx.array(arrays[name]) for name in sorted(arrays)}
    metadata = {
        "version": str(VERSION),
        "iteration": str(iteration),
        "adapter_bytes": str(numbered(folder, iteration, "adapters").stat().st_size),
        "info": json.dumps(info, sort_keys=True),
        "checksum": _checksum(arrays, info),
    }
    # An empty file can't be written.
    arrays["_"] = mx.zeros((1,))
    with writing(path):
        replace_file(path, lambda name: mx.save_safetensors(name, arrays, metadata))
    return path


def load_state(path: str | Path) -> TrainingState:
    """Read a state."""
    path = Path(path)
    try:
        arrays, metadata = mx.load(str(path), return_metadata=True)
        info, iteration = json.loads(metadata["info"]), int(metadata["iteration"])
        arrays.pop("_")
        whole = _checksum(arrays, info) == metadata["checksum"]
    except (RuntimeError, KeyError, ValueError, OSError) as e:
        raise InputError(f"{path} can't be read ({e}).") from e
    if not whole or metadata["version"] != str(VERSION):
        raise InputError(f"{path} is damaged, or of another version.")
    adapter = numbered(path.parent, iteration, "adapters")
    size = adapter.stat().st_size if adapter.exists() else None
    if str(size) != metadata.get("adapter_bytes"):
        what = "missing" if size is None else "damaged"
        raise InputError(f"{path} has no weights beside it: {adapter.name} is {what}.")
    return TrainingState(iteration, arrays, info, adapter)


def newest_state(folder: str | Path) -> TrainingState | None:
    """Read the newest state of a run that can be read."""
    for path in sorted(Path(folder).glob("*_state.safetensors"), reverse=True):
        try:
            return load_state(path)
        except ValueError as e:
            rprint(f"[WARNING] {e} Going back to the checkpoint before it.")
    return None


def _iteration(path):
    return int(path.name.partition("_")[0])


def drop_old(folder: str | Path, keep: int | None) -> None:
    """Delete the checkpoints that are no longer wanted."""
    states = sorted(Path(folder).glob("[0-9]*_state.safetensors"))
    kept = states[-(keep or KEPT_STATES) :]
    for path in states[: -len(kept)]:
        path.unlink(missing_ok=True)
    if not keep or not kept:
        return
    wanted = {_iteration(path) for path in kept}
    for path in Path(folder).glob("[0-9]*_adapters.safetensors"):
        # Higher numbers are an earlier run's.
        if _iteration(path) < max(wanted) and _iteration(path) not in wanted:
            path.unlink(missing_ok=True)


def drop_newer(folder: str | Path, iteration: int) -> None:
    """Delete states that a run never comes back to: an earlier run's, or damaged."""
    for path in Path(folder).glob("[0-9]*_state.safetensors"):
        if _iteration(path) > iteration:
            path.unlink(missing_ok=True)


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write the trainable parameters, completely or not at all."""
    weights = dict(sorted(tree_flatten(model.trainable_parameters())))
    with writing(path):
        replace_file(path, lambda name: mx.save_safetensors(name, weights))


def data_fingerprint(dataset: Any) -> str:
    """A name for the pairs of a data set and their weights, labels and the like."""
    digest = hashlib.blake2b(digest_size=8)
    for i in range(len(dataset or [])):
        digest.update(pair_key(*dataset[i][:3]))
    for name, values in sorted(getattr(dataset, "values", {}).items()):
        digest.update(name.encode() + np.asarray(values, "<f4").tobytes())
    return digest.hexdigest()


_MEANINGS = {
    "model": "the model (its weights, MLX's version or the kind of device) is",
    "reference": "the reference model is",
    "train": "the training pairs are",
    "valid": "the validation pairs are",
}


def check_identity(
    state: TrainingState, identity: dict[str, str], args: SimpleNamespace
) -> None:
    """Check that a checkpoint belongs to what would go on with it."""
    before = state.info["identity"]
    for name, value in identity.items():
        if before.get(name) == value:
            continue
        what = _MEANINGS.get(name, f"{name} is")
        if not args.resume_anyway:
            raise InputError(
                f"Can't resume {args.resume}: {what} not what the run was started with. "
                "Restore that, or give --resume-anyway to go on all the same."
            )
        rprint(f"[WARNING] {what[0].upper()}{what[1:]} not what the run started with.")
