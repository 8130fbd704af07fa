# Copyright © 2026 MLX Contributors

import json
from pathlib import Path

from . import _upstream_callbacks
from ._upstream_callbacks import (
    SUPPORT_CALLBACK,
    Optional,
    SwanLabCallback,
    TrainingCallback,
    WandBCallback,
    get_reporting_callbacks,
    os,
    swanlab,
    wandb,
)
from .atomic_files import writing
from .tracking import TRACKERS, missing_package

# In place: upstream's get_reporting_callbacks looks there.
SUPPORT_CALLBACK.update(TRACKERS)


class CallbackList(TrainingCallback):
    """
    Hand every report to several callbacks, in their order.

    Args:
        callbacks (list): The callbacks; ``None`` entries are left out.

    Example:
        >>> CallbackList([None, TrainingCallback()]).on_val_loss_report({})
    """

    def __init__(self, callbacks: list[TrainingCallback | None]):
        self.callbacks = [c for c in callbacks if c is not None]

    def on_train_loss_report(self, train_info: dict) -> None:
        for callback in self.callbacks:
            callback.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: dict) -> None:
        for callback in self.callbacks:
            callback.on_val_loss_report(val_info)


class MetricsFile(TrainingCallback):
    """
    Append every report to a file, one JSON object a line.

    Args:
        path (str or Path): The file, made anew.
        keep (int): Bytes of an earlier file that stay, when a run is resumed: what
            was written behind its checkpoint is written again. Default: ``0``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = MetricsFile(f"{folder}/metrics.jsonl")
        ...     file.on_train_loss_report({"iteration": 1, "loss": 0.5})
        ...     Path(f"{folder}/metrics.jsonl").read_text()
        '{"iteration": 1, "loss": 0.5}\\n'
    """

    def __init__(self, path: str | Path, keep: int = 0):
        self.path = Path(path)
        with writing(self.path), open(self.path, "ab") as fid:
            # A file that was deleted meanwhile must not grow to its old length.
            fid.truncate(min(keep, fid.tell()))

    def _append(self, info):
        with writing(self.path), open(self.path, "a") as fid:
            fid.write(json.dumps(info) + "\n")
            # A checkpoint, which is synced too, counts on it.
            fid.flush()
            os.fsync(fid.fileno())

    def on_train_loss_report(self, train_info: dict) -> None:
        self._append(train_info)

    def on_val_loss_report(self, val_info: dict) -> None:
        self._append(val_info)


def missing_tracker(name: str) -> str | None:
    """
    Tell whether a service's package is missing.

    Args:
        name (str): A key of ``SUPPORT_CALLBACK``.

    Returns:
        str: The package to install, None if it is there.

    Example:
        >>> missing_tracker("tensorboard") in (None, "tensorboardX")
        True
    """
    if name in TRACKERS:
        return missing_package(TRACKERS[name].package)
    return name if getattr(_upstream_callbacks, name) is None else None


def read_lines(path: str | Path) -> list[dict]:
    """
    Read a file of one JSON object a line.

    Args:
        path (str or Path): The file; it may be missing.

    Returns:
        list: Its objects; half a line, as a killed process leaves it, is left out.

    Example:
        >>> read_lines("nowhere.jsonl")
        []
    """
    if not Path(path).exists():
        return []
    objects = []
    for line in Path(path).read_text("utf-8").splitlines():
        try:
            objects.append(json.loads(line))
        except ValueError:
            continue
    return objects
