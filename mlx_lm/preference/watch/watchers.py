# Copyright © 2026 MLX Contributors

"""What a run keeps an eye on beside its metrics."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ...tuner.callbacks import TrainingCallback
from ..files import check_plain
from ..run.checkpoint import TrainingState
from ..run.folder import METRICS
from ..terminal import rprint
from . import retained_text, samples
from .falling_chosen import FallingChosen

# Of an earlier run in the same folder they would be wrong.
LEFT_BY_RUNS = (samples.FILE_NAME, retained_text.FILE_NAME)


@dataclass(frozen=True, eq=False)
class WatchedRun:
    """What watchers are made of: a run's folder, its models, what it is asked."""

    folder: Path
    model: nn.Module
    tokenizer: Any
    valid_set: Any
    # Whether rewards are measured from the policy as it was.
    frozen_start: bool
    sample_prompts: Any = None
    sample_tokens: int = 64

    def check(self) -> None:
        """Find out, before anything is written, what could not be watched."""
        if self.sample_prompts is not None and self.valid_set:
            check_plain(self.folder / samples.FILE_NAME)
            prompts = samples.read_prompts(self.sample_prompts)
            samples.encode_prompts(self.tokenizer, prompts)


def run_watchers(
    run: WatchedRun,
    state: TrainingState | None = None,
    reference: nn.Module | None = None,
) -> list[TrainingCallback]:
    """The callbacks of a run beside its metrics, on the first rank."""
    # The reference is the model itself where the run starts from it: it still does.
    keep = -1
    if state is None:
        for name in LEFT_BY_RUNS:
            (run.folder / name).unlink(missing_ok=True)
    else:
        # A validation that was interrupted is done again.
        keep = state.iteration - state.info["pending"]
    falling = FallingChosen(run.folder / METRICS, run.frozen_start)
    watchers: list[TrainingCallback] = [falling]
    if run.sample_prompts is not None and not run.valid_set:
        rprint("[WARNING] sample_prompts needs validation pairs: none are answered.")
    elif run.sample_prompts is not None:
        answers = samples.PromptSamples(
            run.model,
            run.tokenizer,
            samples.read_prompts(run.sample_prompts),
            run.folder / samples.FILE_NAME,
            run.sample_tokens,
            keep,
            reference,
        )
        watchers.append(answers)
    return watchers
