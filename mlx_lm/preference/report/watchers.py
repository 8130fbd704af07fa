# Copyright © 2026 MLX Contributors

"""What a run keeps an eye on beside its metrics, and what it shows at the end."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...cli_ui import rprint
from ...tuner.callbacks import TrainingCallback
from ..measure import pair_metrics
from ..objective.objective import objective_of
from ..run.checkpoint import TrainingState
from ..run.folder import METRICS
from ..watch import retained_text
from ..watch import samples as prompt_samples
from ..watch.falling_chosen import FallingChosen
from ..watch.samples import PromptSamples, read_prompts
from . import inspect as report_pairs
from .page import PAGE, PICTURE, write_report

# Of an earlier run in the same folder they would be wrong.
LEFT_BY_RUNS = (
    prompt_samples.FILE_NAME,
    retained_text.FILE_NAME,
    report_pairs.FILE_NAME,
    pair_metrics.FILE_NAME,
    PAGE,
    PICTURE,
)


def run_watchers(
    args: SimpleNamespace,
    model: nn.Module,
    tokenizer: Any,
    valid_set: Any,
    state: TrainingState | None = None,
) -> list[TrainingCallback]:
    """The callbacks of a run beside its metrics, on the first rank."""
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
    """Write a run's report if that is asked for."""
    if args.report and mx.distributed.init().rank() == 0:
        rprint(f"Wrote {write_report(args.adapter_path)}")
