# Copyright © 2026 MLX Contributors

"""A run's adapter folder, made ready before the first step."""

from pathlib import Path
from types import SimpleNamespace

from ..utils import save_config
from .atomic_files import remove_leftovers, replace_file, writing
from .callbacks import (
    CallbackList,
    MetricsFile,
    TrainingCallback,
    get_reporting_callbacks,
)
from .dpo_config import saved_settings
from .training_state import TrainingState, drop_newer


def open_folder(
    args: SimpleNamespace,
    state: TrainingState | None = None,
    training_callback: TrainingCallback | None = None,
) -> CallbackList:
    """
    Make the adapter folder ready, and what will write a run's metrics there.

    Only the first rank does it. States that are newer than the one to go on from
    are dropped; the settings are written.

    Args:
        args (SimpleNamespace): The run's settings.
        state (TrainingState, optional): What the run goes on from. Default: it
            begins, and no earlier state in the folder is its own.
        training_callback (TrainingCallback, optional): Also gets the metrics.

    Returns:
        CallbackList: Writes the metrics to ``metrics.jsonl`` and to the services
        that ``report_to`` names.

    Raises:
        OSError: If the folder can't be written.
        ValueError: If ``report_to`` names an unknown service.

    Example:
        >>> import tempfile
        >>> from mlx_lm.dpo import resolve_args
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = resolve_args(["--adapter-path", f"{folder}/new"])
        ...     callback = open_folder(args)
        ...     sorted(path.name for path in Path(args.adapter_path).iterdir())
        ['adapter_config.json', 'metrics.jsonl']
    """
    folder = Path(args.adapter_path)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    config = saved_settings(args)
    reporting = get_reporting_callbacks(
        args.report_to, args.project_name, args.adapter_path, config
    )
    for place in (folder, folder / "best"):
        remove_leftovers(place)
    # An earlier run's states do not belong to these settings.
    drop_newer(folder, state.iteration if state else -1)
    config_file = folder / "adapter_config.json"
    with writing(config_file):
        replace_file(config_file, lambda name: save_config(config, name))
    written = state.info["metrics_bytes"] if state else 0
    metrics_file = MetricsFile(folder / "metrics.jsonl", written)
    return CallbackList([metrics_file, reporting, training_callback])
