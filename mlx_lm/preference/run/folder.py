# Copyright © 2026 MLX Contributors

"""A run's adapter folder, made ready before the first step."""

import platform
import stat
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...tuner.callbacks import TrainingCallback
from ...utils import save_config
from ..errors import InputError
from ..features import features
from ..files import (
    append_text,
    check_plain,
    json_text,
    open_plain,
    remove_leftovers,
    replace_file,
    writing,
)
from ..terminal import rprint
from .job import Job


class CallbackList(TrainingCallback):
    """Hand every report to several callbacks, in their order."""

    def __init__(self, callbacks: list[TrainingCallback | None], careful: bool = False):
        self.callbacks = [c for c in callbacks if c is not None]
        # Whether one that fails is left out: what looks on never ends a run.
        self._careful = careful

    def on_train_loss_report(self, train_info: dict) -> None:
        self._report("on_train_loss_report", train_info)

    def on_val_loss_report(self, val_info: dict) -> None:
        self._report("on_val_loss_report", val_info)

    def _report(self, kind, info):
        for callback in [*self.callbacks]:
            try:
                getattr(callback, kind)(info)
            except InputError:
                # A full disk, which the run meets too.
                raise
            except Exception as e:
                if not self._careful:
                    raise
                reason = f"{type(e).__name__}: {' '.join(str(e).split())}"
                rprint(f"[WARNING] {type(callback).__name__} is left out: {reason}")
                self.callbacks.remove(callback)


class MetricsFile(TrainingCallback):
    """Append every report to a file, one JSON object a line."""

    def __init__(self, path: str | Path, keep: int = 0):
        self.path = Path(path)
        with writing(self.path), open(self.path, "ab", opener=open_plain) as fid:
            # A file that was deleted meanwhile must not grow to its old length.
            fid.truncate(min(keep, fid.tell()))

    def _append(self, info):
        # A checkpoint, which is synced too, counts on it.
        append_text(self.path, json_text(info) + "\n")

    def on_train_loss_report(self, train_info: dict) -> None:
        self._append(train_info)

    def on_val_loss_report(self, val_info: dict) -> None:
        self._append(val_info)


TRAINED_WITH = "mlx_lm.dpo"
METRICS = "metrics.jsonl"
FOLDERS = ("best", "tensorboard")


PACKAGES = ("mlx-lm", "mlx", "transformers", "tokenizers", "numpy")


def run_versions() -> dict[str, str]:
    """The versions of packages and Python, and the machine."""
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    device = mx.device_info().get("device_name") if mx.metal.is_available() else None
    return versions | {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": str(device or mx.default_device()),
    }


def saved_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as they are written beside the adapter."""
    # How a process came to the run is not the run's.
    config = {**settings, "resume": None, "resume_anyway": False, "restart": False}
    for name in ("explicit", "secrets"):
        config.pop(name, None)
    return {**config, "trained_with": TRAINED_WITH, "versions": run_versions()}


def check_folder(folder: str | Path) -> None:
    """Check that nothing in a run's folder leads out of it."""
    check_plain(Path(folder) / METRICS)
    for name in FOLDERS:
        check_plain(Path(folder) / name, stat.S_ISDIR)


def open_folder(
    job: Job, training_callback: TrainingCallback | None = None
) -> CallbackList:
    """Make the adapter folder ready, and what gets the run's reports."""
    folder = Path(job.args.adapter_path)
    check_folder(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for feature in features():
        feature.claim_folder(job)
    config = saved_settings(vars(job.args))
    services = [one for x in features() for one in x.services(job, config)]
    for place in (folder, folder / "best"):
        remove_leftovers(place)
    for feature in features():
        feature.clear_folder(job)
    config_file = folder / "adapter_config.json"
    with writing(config_file):
        replace_file(config_file, lambda name: save_config(config, name))
    metrics_file = MetricsFile(folder / METRICS, job.metrics_bytes)
    watchers = [one for x in features() for one in x.watchers(job)]
    careful = CallbackList(watchers, careful=True)
    return CallbackList([metrics_file, *services, training_callback, careful])
