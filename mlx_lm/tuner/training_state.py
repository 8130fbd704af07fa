# Copyright © 2026 MLX Contributors

"""What a run needs to go on as if it had never stopped, in one file.

The weights are in the numbered adapter beside it, which is written first. Random
numbers and the order of the data are functions of the seed and the step, so they
need no state. Written last and in one step, a state is whole or not there.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..cli_ui import rprint
from .atomic_files import replace_file, writing

VERSION = 1
# Older ones are only needed where the newest is damaged.
KEPT_STATES = 2


class TrainingState(NamedTuple):
    """
    A state read from a file.

    Args:
        iteration (int): Steps that were done.
        arrays (dict): Arrays by name.
        info (dict): Numbers and texts.
        adapter (Path): The file of the weights.

    Example:
        >>> TrainingState(3, {}, {}, Path("0000003_adapters.safetensors")).iteration
        3
    """

    iteration: int
    arrays: dict[str, mx.array]
    info: dict[str, Any]
    adapter: Path


def numbered(folder: str | Path, iteration: int, name: str) -> Path:
    """
    The path of a checkpoint's file.

    Args:
        folder (str or Path): The adapter's folder.
        iteration (int): Steps that were done.
        name (str): ``"adapters"`` or ``"state"``.

    Returns:
        Path: The file.

    Example:
        >>> numbered("adapters", 20, "state").name
        '0000020_state.safetensors'
    """
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
    """
    Write a state, completely or not at all; its weights are already there.

    Args:
        folder (str or Path): The adapter's folder.
        iteration (int): Steps that were done.
        arrays (dict): Arrays by name.
        info (dict): What JSON can hold.

    Returns:
        Path: The file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = numbered(folder, 7, "adapters").write_bytes(b"")
        ...     path = save_state(folder, 7, {"x": mx.ones((2,))}, {"pairs": 28})
        ...     newest_state(folder).info
        {'pairs': 28}
    """
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
    """
    Read a state.

    Args:
        path (str or Path): The file.

    Returns:
        TrainingState: What ``save_state`` was given.

    Raises:
        ValueError: If the file is damaged, of another version or without weights.

    Example:
        >>> load_state("nowhere/0000001_state.safetensors")
        Traceback (most recent call last):
        ...
        ValueError: nowhere/0000001_state.safetensors can't be read...
    """
    path = Path(path)
    try:
        arrays, metadata = mx.load(str(path), return_metadata=True)
        info, iteration = json.loads(metadata["info"]), int(metadata["iteration"])
        arrays.pop("_")
        whole = _checksum(arrays, info) == metadata["checksum"]
    except (RuntimeError, KeyError, ValueError, OSError) as e:
        raise ValueError(f"{path} can't be read ({e}).") from e
    if not whole or metadata["version"] != str(VERSION):
        raise ValueError(f"{path} is damaged, or of another version.")
    adapter = numbered(path.parent, iteration, "adapters")
    size = adapter.stat().st_size if adapter.exists() else None
    if str(size) != metadata.get("adapter_bytes"):
        what = "missing" if size is None else "damaged"
        raise ValueError(f"{path} has no weights beside it: {adapter.name} is {what}.")
    return TrainingState(iteration, arrays, info, adapter)


def newest_state(folder: str | Path) -> TrainingState | None:
    """
    Read the newest state of a run that can be read.

    Args:
        folder (str or Path): The adapter's folder.

    Returns:
        TrainingState: The state, or None if there is none.

    Example:
        >>> newest_state("nowhere") is None
        True
    """
    for path in sorted(Path(folder).glob("*_state.safetensors"), reverse=True):
        try:
            return load_state(path)
        except ValueError as e:
            rprint(f"[WARNING] {e} Going back to the checkpoint before it.")
    return None


def _iteration(path):
    return int(path.name.partition("_")[0])


def drop_old(folder: str | Path, keep: int | None) -> None:
    """
    Delete the checkpoints that are no longer wanted.

    Args:
        folder (str or Path): The adapter's folder.
        keep (int, optional): How many checkpoints stay. Default: every adapter,
            and the states of the newest two.

    Example:
        >>> drop_old("nowhere", 1)
    """
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
    """
    Delete states that a run never comes back to: an earlier run's, or damaged.

    Args:
        folder (str or Path): The adapter's folder.
        iteration (int): Where the run begins; -1 deletes all.

    Example:
        >>> drop_newer("nowhere", 0)
    """
    for path in Path(folder).glob("[0-9]*_state.safetensors"):
        if _iteration(path) > iteration:
            path.unlink(missing_ok=True)
