# Copyright © 2026 MLX Contributors

"""What a run needs to go on as if it had never stopped, in one file.

The weights are in the numbered adapter beside it, which is written first. Random
numbers and the order of the data are functions of the seed and the step, so they
need no state. Written last and in one step, a state is whole or not there.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..digest import digest, file_digest
from ..errors import InputError
from ..files import json_text, replace_file, writing
from ..policy.adapter import ADAPTER
from ..reference.cache import pair_keys
from ..terminal import rprint
from .adapters import numbered

VERSION = 4
_STATE = re.compile("([0-9]{7,})_state.safetensors")
# Older ones are only needed where the newest is damaged.
KEPT_STATES = 2


# What a state's information is, which somebody may have written by hand.
_KINDS = {"parts": dict, "identity": dict, "pending": bool}
_KINDS |= {"updates": int, "metrics_bytes": int}


class _OtherVersion(InputError):
    """A checkpoint that is whole, but not of this version's making."""


class TrainingState(NamedTuple):
    """A state read from a file."""

    iteration: int
    arrays: dict[str, mx.array]
    info: dict[str, Any]
    adapter: Path


def save_state(
    folder: str | Path, iteration: int, arrays: dict[str, mx.array], info: dict
) -> Path:
    """Write a state, completely or not at all; its weights are already there."""
    path = numbered(folder, iteration, "state")
    arrays = {name: mx.array(arrays[name]) for name in sorted(arrays)}
    text = json_text(info)
    metadata = {
        "version": str(VERSION),
        "iteration": str(iteration),
        "adapter": file_digest(numbered(folder, iteration, "adapters")),
        "info": text,
        "checksum": digest(arrays, text),
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
        is_other = metadata["version"] != str(VERSION)
        whole = digest(arrays, metadata["info"]) == metadata["checksum"]
        whole = whole and path.name == numbered("", iteration, "state").name
        whole = whole and all(type(info.get(k)) is x for k, x in _KINDS.items())
        whole = whole and all(type(x) is dict for x in info["parts"].values())
    except (RuntimeError, KeyError, ValueError, AttributeError, OSError) as e:
        raise InputError(f"{path} can't be read ({e}).") from e
    if is_other:
        raise _OtherVersion(
            f"{path.parent} has a checkpoint of another version of mlx_lm.dpo, "
            f"{path.name}, which alone can go on with it."
        )
    if not whole:
        raise InputError(f"{path} is damaged.")
    adapter = numbered(path.parent, iteration, "adapters")
    # Some delete numbered ones to save room: the newest is a copy.
    for copy in (adapter, path.parent / ADAPTER):
        if copy.is_file() and file_digest(copy) == metadata.get("adapter"):
            return TrainingState(iteration, arrays, info, copy)
    if not adapter.is_file():
        raise InputError(f"{path} has no weights beside it: {adapter.name} is missing.")
    raise InputError(
        f"{adapter} is damaged, or not the one that {path.name} was saved with."
    )


def find_states(folder: str | Path) -> list[tuple[int, Path]]:
    """The steps that a folder has states of, and their files, the newest first."""
    # Beyond seven digits, names sort otherwise than numbers.
    named = [(_STATE.fullmatch(path.name), path) for path in Path(folder).glob("*")]
    found = [(int(m[1]), path) for m, path in named if m and path.is_file()]
    return sorted(found, reverse=True)


def newest_state(folder: str | Path) -> TrainingState | None:
    """Read the newest state of a run whose files are whole; None if it has none yet."""
    states = find_states(folder)
    faults = []
    for _, path in states:
        try:
            state = load_state(path)
        except _OtherVersion:
            raise
        except InputError as e:
            faults.append(f"{e}")
            continue
        for fault in faults:
            rprint(f"[WARNING] {fault} Going back to the checkpoint before it.")
        return state
    if faults:
        raise InputError(
            f"{folder} has checkpoints ({len(states)}), but none can be used: {faults[0]}"
        )
    # Each is written after the first state.
    if (Path(folder) / ADAPTER).exists():
        raise InputError(f"{folder} has an adapter, but no checkpoint to go on with.")
    return None


def drop_newer(folder: str | Path, iteration: int) -> None:
    """Delete states that a run never comes back to: an earlier run's, or damaged."""
    for step, path in find_states(folder):
        if step > iteration:
            path.unlink(missing_ok=True)


class Checkpoints:
    """The numbered files of one run; those of others in its folder stay."""

    def __init__(self, folder: str | Path, keep: int | None = None):
        self.folder, self.keep = Path(folder), keep
        self.steps: list[int] = []
        # A killed process may not have come to it.
        self._has_old = True

    def name_last(self, taken: float = math.inf) -> str:
        """Name the last one for the user: of those before a step that was taken."""
        if not self.steps:
            return "There is no checkpoint yet."
        proven = [step for step in self.steps if step < taken]
        last = (proven or self.steps)[-1]
        text = f"The last checkpoint is {numbered(self.folder, last, 'adapters')}."
        if not proven:
            return f"{text} No step was taken from it."
        newer = [numbered("", x, "state").name for x in self.steps if x > last]
        # Resuming takes the newest one.
        return text + f" To resume from it, delete {', '.join(newer)}." * bool(newer)

    def add(self, iteration: int) -> None:
        """Count a checkpoint that is about to be written."""
        if iteration not in self.steps[-1:]:
            self.steps.append(iteration)
            self._has_old = True

    def drop_old(self) -> None:
        """Delete those that are no longer wanted, once the newest is known to work."""
        if not self._has_old:
            return
        self._has_old = False
        for iteration in self.steps[: -(self.keep or KEPT_STATES)]:
            numbered(self.folder, iteration, "state").unlink(missing_ok=True)
        if self.keep:
            for iteration in self.steps[: -self.keep]:
                numbered(self.folder, iteration, "adapters").unlink(missing_ok=True)
            del self.steps[: -self.keep]

    def state_dict(self) -> tuple[dict[str, mx.array], dict[str, Any]]:
        return {}, {"steps": self.steps}

    def load_state_dict(self, arrays: dict[str, mx.array], info: dict) -> None:
        self.steps = info["steps"]


def data_fingerprint(dataset: Any) -> str:
    """A name for the pairs of a data set and their weights, labels and the like."""
    named = getattr(dataset, "values", {}).items()
    values = {name: np.asarray(column, "<f4") for name, column in named}
    return digest(pair_keys(dataset), values, size=8)


_MEANINGS = {
    "model": "the model (its weights or code, a version or the kind of device) is",
    "reference": "the reference model is",
    "train": "the training pairs are",
    "valid": "the validation pairs are",
}


def check_identity(
    state: TrainingState, identity: dict[str, str], folder: str, anyway: bool
) -> None:
    """Check that a checkpoint belongs to what would go on with it."""
    before = state.info["identity"]
    for name, value in identity.items():
        if before.get(name) == value:
            continue
        what = _MEANINGS.get(name, f"{name} is")
        if not anyway:
            raise InputError(
                f"Can't resume {folder}: {what} not what the run was started with. "
                "Restore that, or give --resume-anyway to go on all the same."
            )
        rprint(f"[WARNING] {what[0].upper()}{what[1:]} not what the run started with.")
