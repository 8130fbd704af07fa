# Copyright © 2026 MLX Contributors

"""What a run may do beside its steps. Who trains asks all features, and names none."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from .setting import Setting

# Each module's FEATURE takes part, in this order.
PLUG_INS = (
    "settings.datasets",
    "policy.head",
    "settings.earlier",
    "run.notices",
    "run.layouts",
    "run.forecast",
    "run.compressed",
    "reference.feature",
    "run.resume",
    "settings.together",
    "run.best",
    "reference.moving",
    "policy.masters",
    "forward.recompute",
    "forward.packed",
    "run.tokens",
    "run.kernels",
    "watch.feature",
    "watch.gradients",
    "policy.peft",
    "report.feature",
    "collect.feature",
)


class Feature:
    """Something that a run may have. None of its methods has to do anything."""

    # The command's settings come in a job, see run/job.py, or alone to what is asked
    # before there is one. train_dpo asks the last four methods, with DPOTrainingArgs.

    # Settings beside these that are declared elsewhere, and read by it alone.
    brings: tuple[str, ...] = ()

    def settings(self) -> dict[str, Iterable[Setting]]:
        """Settings of the command, by the group in which they are listed."""
        return {}

    def begin(self, args: Any) -> None:
        """Look at the settings before all else."""

    def complete(self, args: Any) -> str | Path | None:
        """Take settings from what lies in a folder, and tell in which."""
        return None

    def check(self, args: Any) -> None:
        """Refuse settings that make no sense, before anything is loaded."""

    def around_command(self, args: Any) -> AbstractContextManager:
        """What holds while the command runs."""
        return nullcontext()

    def takes_over(self, args: Any) -> bool:
        """Do all that the settings ask for, if that is no run."""
        return False

    def rows(self, args: Any) -> dict[str, Any]:
        """What ``load_preference_dataset`` gets, beside what is asked for anyway."""
        return {}

    def reference_model(self, args: Any, tokenizer: Any) -> Any:
        """Load a model that is the reference, if the policy's start is not."""
        return None

    def policy_made(self, args: Any, model: Any) -> None:
        """Complete a model whose trained part was made."""

    def after_loading(self, job: Any) -> None:
        """Look at the data that were loaded."""

    def before_weights(self, job: Any) -> None:
        """Look at a run whose weights are not read yet."""

    def after_weights(self, job: Any) -> None:
        """Look at a run whose weights are there, and complete it."""

    def header_rows(self, job: Any, rows: dict[str, str]) -> None:
        """Add to what the run's header says."""

    def before_folder(self, job: Any) -> None:
        """Find out what could not be done, before anything is written."""

    def inputs(self, job: Any) -> dict[str, Any]:
        """What all ranks must have loaded alike, by the names of it."""
        return {}

    def agree(self, job: Any) -> None:
        """Wait for all ranks, before anything is written."""

    def claim_folder(self, job: Any) -> None:
        """Keep the run's folder, which is there now."""

    def services(self, job: Any, config: dict) -> Iterable[Any]:
        """Callbacks that need the settings as they are saved."""
        return ()

    def clear_folder(self, job: Any) -> None:
        """Delete what an earlier run has left."""

    def watchers(self, job: Any) -> Iterable[Any]:
        """Callbacks that look on: one that fails is left out."""
        return ()

    def around_training(self, job: Any) -> AbstractContextManager:
        """What holds while a run of the command is trained."""
        return nullcontext()

    def after_training(self, job: Any) -> None:
        """Look at a run that is trained."""

    def before_test(self, job: Any, reference: Any, dataset: Any) -> None:
        """Look at a test whose weights are not read yet."""

    def finish(self, job: Any) -> None:
        """Do what the settings ask for beside training."""

    def failed(self, error: Exception, args: Any) -> Exception | None:
        """What ended the command, or nothing if another rank tells it."""
        return error

    def optimizer(self, optimizer: Any, model: Any, args: Any) -> Any:
        """What takes the place of the optimizer."""
        return optimizer

    def reference(self, start: Any, args: Any) -> Any:
        """What takes the place of a model that is asked in every step, if anything."""
        return None

    def parts(self, run: Any) -> dict[str, Any]:
        """Parts of a run's loop, by the names that they have in a checkpoint."""
        # A part may have state_dict() and load_state_dict(arrays, info), a context
        # around(run) of all steps, options of the batches in batches(), more of what is
        # reported in reports(), a sentence in name_last(step), and what gets the run
        # and the step: begin, after_step, after_update, after_report (and metrics),
        # after_validation_batch, after_validation (and metrics),
        # after_first_validation, ends_early, before_save on every rank, after_save on
        # the first, at_rest when all that a step brings along is done, and end.
        return {}

    def around(self, model: Any, args: Any, folder: Any) -> AbstractContextManager:
        """What holds while ``train_dpo`` runs."""
        return nullcontext()


@cache
def features() -> tuple[Feature, ...]:
    """All features, in the order of the list."""
    package = __package__ or ""
    return tuple(import_module(f"{package}.{name}").FEATURE for name in PLUG_INS)


@contextmanager
def around(what: str, *given: Any) -> Iterator[None]:
    """Stay in the context that each feature has for this."""
    with ExitStack() as stack:
        for feature in features():
            stack.enter_context(getattr(feature, what)(*given))
        yield


def tell(parts: dict[str, Any], what: str, *given: Any) -> Iterator[Any]:
    """What those parts return that have a method of this name."""
    for part in parts.values():
        if method := getattr(part, what, None):
            yield method(*given)
