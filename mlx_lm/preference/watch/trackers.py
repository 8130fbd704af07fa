# Copyright © 2026 MLX Contributors

"""Reports to trackers that upstream does not know: TensorBoard and Trackio."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...tuner import callbacks
from ..errors import InputError
from ..run.folder import CallbackList


def numbers(info: dict[str, Any]) -> dict[str, float]:
    """Pick what a tracker can draw out of a report."""
    return {
        name: float(value)
        for name, value in info.items()
        if name != "iteration" and hasattr(value, "__float__")
    }


class _Tracker(callbacks.TrainingCallback):
    """Hands the numbers of every report to ``self._log``."""

    package = ""
    _start: Callable[..., None]
    _log: Callable[..., None]

    def __init__(self, project_name: str | None, log_dir: str, config: dict):
        if missing := missing_package(self.package):
            raise InputError(f"report_to needs {missing}: pip install {missing}")
        module = importlib.import_module(self.package)
        self._start(module, project_name, Path(log_dir), config)

    def on_train_loss_report(self, train_info):
        self._log(numbers(train_info), train_info.get("iteration"))

    on_val_loss_report = on_train_loss_report


class TensorBoardCallback(_Tracker):
    """Write event files for TensorBoard into the adapter's folder."""

    package = "tensorboardX"

    def _start(self, module, project_name, log_dir, config):
        self._writer = module.SummaryWriter(str(log_dir / "tensorboard"))
        lines = "\n".join(f"    {name}: {value}" for name, value in config.items())
        self._writer.add_text("settings", lines)

    def _log(self, values, step):
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        # A run that is killed keeps what it has reported.
        self._writer.flush()


class TrackioCallback(_Tracker):
    """Report to Trackio, which shows the run with ``trackio show``."""

    package = "trackio"

    def _start(self, module, project_name, log_dir, config):
        self._module = module
        # It finishes by itself when the process ends.
        name = log_dir.resolve().name
        module.init(project=project_name or "mlx_lm", name=name, config=config)

    def _log(self, values, step):
        self._module.log(values, step=step)


TRACKERS = {"tensorboard": TensorBoardCallback, "trackio": TrackioCallback}
# Upstream's table stays as it is.
SERVICES = {**callbacks.SUPPORT_CALLBACK, **TRACKERS}


def service_names(report_to: str | None) -> list[str]:
    """The services that a setting names."""
    return [x for name in (report_to or "").split(",") if (x := name.strip().lower())]


def reporting_callbacks(
    report_to: str | None, project_name: str | None, log_dir: str, config: dict
) -> CallbackList:
    """The callbacks of the services that ``report_to`` names."""
    names = service_names(report_to)
    made = [SERVICES[name](project_name, log_dir, config) for name in names]
    return CallbackList(made, careful=True)


def missing_package(name: str) -> str | None:
    """Tell whether a package can't be imported."""
    # What a package needs in turn may be missing: only an import tells.
    try:
        importlib.import_module(name)
    except ImportError:
        return name
    return None


def missing_tracker(name: str) -> str | None:
    """Tell whether a service's package is missing."""
    if name in TRACKERS:
        return missing_package(TRACKERS[name].package)
    return name if getattr(callbacks, name) is None else None


def check_matplotlib(setting: str = "report") -> None:
    """Check that matplotlib is there, without importing it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"{setting} needs matplotlib: pip install matplotlib")
