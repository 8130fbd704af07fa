# Copyright © 2026 MLX Contributors

"""What a run keeps an eye on beside its metrics, and what it shows at the end."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..cli_ui import rprint
from . import pair_metrics, prompt_samples, report_pairs, retained_text
from .callbacks import TrainingCallback
from .falling_chosen import FallingChosen
from .objective import objective_of
from .prompt_samples import PromptSamples, read_prompts
from .report import PAGE, PICTURE, check_matplotlib, write_report
from .training_state import TrainingState

METRICS = "metrics.jsonl"
# Of an earlier run in the same folder they would be wrong.
LEFT_BY_RUNS = (
    prompt_samples.FILE_NAME,
    retained_text.FILE_NAME,
    report_pairs.FILE_NAME,
    pair_metrics.FILE_NAME,
    PAGE,
    PICTURE,
)


def check_watchers(args: SimpleNamespace) -> None:
    """
    Check the settings of samples, ordinary text and report before anything loads.

    Args:
        args (SimpleNamespace): The run's settings.

    Raises:
        ValueError: If a file can't be used or matplotlib is missing.

    Example:
        >>> from mlx_lm.dpo import resolve_args
        >>> check_watchers(resolve_args(["--retain-data", "nowhere.txt"]))
        Traceback (most recent call last):
        ...
        ValueError: retain_data nowhere.txt can't be read: No such file or directory. \
Name a text file.
    """
    if args.sample_prompts is not None:
        read_prompts(args.sample_prompts)
    if args.retain_data is not None:
        retained_text.read_text(args.retain_data)
    if args.report:
        check_matplotlib()
        if not args.adapter_path:
            raise ValueError("report needs adapter_path: it is written there.")
        if not args.train and not (Path(args.adapter_path) / METRICS).exists():
            raise ValueError(
                f"report shows a run, but {args.adapter_path} has no {METRICS}. Leave "
                "it out, or give --adapter-path the folder of a run."
            )


def run_watchers(
    args: SimpleNamespace,
    model: nn.Module,
    tokenizer: Any,
    valid_set: Any,
    state: TrainingState | None = None,
) -> list[TrainingCallback]:
    """
    The callbacks of a run beside its metrics, on the first rank.

    Args:
        args (SimpleNamespace): The run's settings. Its folder is there, with the
            metrics up to where the run goes on.
        model (nn.Module): The policy.
        tokenizer (TokenizerWrapper): Its tokenizer.
        valid_set (PreferenceDataset): Held-out pairs, may be empty.
        state (TrainingState, optional): What the run goes on from.

    Returns:
        list: Callbacks.

    Raises:
        ValueError: If prompts need a chat template and there is none.

    Example:
        >>> run_watchers.__name__  # see tests/test_run_watchers.py
        'run_watchers'
    """
    folder, keep = Path(args.adapter_path), -1
    if state is None:
        for name in LEFT_BY_RUNS:
            (folder / name).unlink(missing_ok=True)
    else:
        # A validation that was interrupted is done again.
        keep = state.iteration - state.info["pending"]
    moves = args.reference_model is not None or args.sync_reference
    frozen_start = objective_of(args).needs_reference and not moves
    watchers: list[TrainingCallback] = [FallingChosen(folder / METRICS, frozen_start)]
    if args.sample_prompts is not None and not valid_set:
        rprint("[WARNING] sample_prompts needs validation pairs: none are answered.")
    elif args.sample_prompts is not None:
        samples = PromptSamples(
            model,
            tokenizer,
            read_prompts(args.sample_prompts),
            folder / prompt_samples.FILE_NAME,
            args.sample_tokens,
            keep,
        )
        watchers.append(samples)
    return watchers


def show_report(args: SimpleNamespace) -> None:
    """
    Write a run's report if that is asked for.

    Args:
        args (SimpleNamespace): The run's settings.

    Example:
        >>> show_report(SimpleNamespace(report=False))
    """
    if args.report and mx.distributed.init().rank() == 0:
        rprint(f"Wrote {write_report(args.adapter_path)}")
