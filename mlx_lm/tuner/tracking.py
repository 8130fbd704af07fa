# Copyright © 2026 MLX Contributors

"""Reports to trackers that upstream does not know: TensorBoard and Trackio."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def numbers(info: dict[str, Any]) -> dict[str, float]:
    """
    Pick what a tracker can draw out of a report.

    Args:
        info (dict): A report of ``train_dpo`` or ``train``.

    Returns:
        dict: Its numbers by name; not the iteration.

    Example:
        >>> numbers({"iteration": 3, "loss": 0.5, "gradients": {"a": 1.0}})
        {'loss': 0.5}
    """
    return {
        name: float(value)
        for name, value in info.items()
        if name != "iteration" and hasattr(value, "__float__")
    }


# Not a TrainingCallback by name: the callbacks import this file.
class _Tracker:
    """Hands the numbers of every report to ``self._log``."""

    package = ""
    _start: Callable[..., None]
    _log: Callable[..., None]

    def __init__(
        self,
        project_name: str | None,
        log_dir: str,
        config: dict,
        wrapped_callback: Any = None,
    ):
        self.wrapped_callback = wrapped_callback
        if missing := missing_package(self.package):
            raise ImportError(f"report_to needs {missing}: pip install {missing}")
        module = importlib.import_module(self.package)
        self._start(module, project_name, Path(log_dir), config)

    def on_train_loss_report(self, train_info):
        self._log(numbers(train_info), train_info.get("iteration"))
        if self.wrapped_callback:
            self.wrapped_callback.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info):
        self._log(numbers(val_info), val_info.get("iteration"))
        if self.wrapped_callback:
            self.wrapped_callback.on_val_loss_report(val_info)


class TensorBoardCallback(_Tracker):
    """
    Write event files for TensorBoard into the adapter's folder.

    Args:
        project_name (str, optional): Without effect.
        log_dir (str): The adapter's folder; the files go to ``tensorboard/``.
        config (dict): The settings, shown as text.
        wrapped_callback (TrainingCallback, optional): Called after it.

    Raises:
        ImportError: If tensorboardX is missing.

    Example:
        >>> TensorBoardCallback.package
        'tensorboardX'
    """

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
    """
    Report to Trackio, which shows the run with ``trackio show``.

    Args:
        project_name (str, optional): The project. Default: ``"mlx_lm"``.
        log_dir (str): The adapter's folder; its name is the run's.
        config (dict): The settings.
        wrapped_callback (TrainingCallback, optional): Called after it.

    Raises:
        ImportError: If trackio is missing.

    Example:
        >>> TrackioCallback.package
        'trackio'
    """

    package = "trackio"

    def _start(self, module, project_name, log_dir, config):
        self._module = module
        # It finishes by itself when the process ends.
        name = log_dir.resolve().name
        module.init(project=project_name or "mlx_lm", name=name, config=config)

    def _log(self, values, step):
        self._module.log(values, step=step)


TRACKERS = {"tensorboard": TensorBoardCallback, "trackio": TrackioCallback}


def missing_package(name: str) -> str | None:
    """
    Tell whether a package can't be imported.

    Args:
        name (str): The package.

    Returns:
        str: Its name if it is missing, None if it is there.

    Example:
        >>> missing_package("json") is None, missing_package("no_such_package")
        (True, 'no_such_package')
    """
    # What a package needs in turn may be missing: only an import tells.
    try:
        importlib.import_module(name)
    except ImportError:
        return name
    return None
