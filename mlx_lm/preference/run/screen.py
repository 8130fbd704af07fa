# Copyright © 2026 MLX Contributors

"""What a run shows while it goes."""

import math
import time
from collections.abc import Mapping
from typing import Any

from rich.box import ROUNDED
from rich.panel import Panel
from rich.text import Text

from ...cli_ui import TrainUI, make_console
from ..terminal import visible


def format_duration(seconds: float) -> str:
    """Write a duration in its two largest units."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"


def print_header(title: str, rows: list[tuple[str, str]]) -> None:
    """Print upstream's panel of labels and values, which may hold any text."""
    width = max(len(label) for label, _ in rows)
    lines = [
        Text.assemble(
            (f"  {label.ljust(width)}", "ui.label"), "   ", (visible(x), "ui.strong")
        )
        for label, x in rows
    ]
    panel = Panel(
        Text("\n").join(lines),
        title=Text(title, "ui.accent"),
        title_align="left",
        border_style="ui.border",
        box=ROUNDED,
        padding=(0, 2),
    )
    make_console().print(panel)


def _number(value: float, form: str) -> str:
    """A metric; a dash if there was nothing to measure."""
    return "-" if math.isnan(value) else format(value, form)


class PreferenceTrainUI(TrainUI):
    """The training display of ``mlx_lm.lora`` with accuracy, margin and time left."""

    def __init__(self, total_iters: int, rank: int = 0, noun: str = "pairs"):
        super().__init__(total_iters, rank)
        self._total = total_iters
        self._noun = noun
        self._seconds_per_iter: float | None = None
        self._last, self._steps = (0, 0.0), 0

    def __enter__(self) -> "PreferenceTrainUI":
        if self._rank == 0:
            self._console.print(
                "  [ui.heading] iter     loss      acc   margin   tok/s"
                f"{self._noun:>9}     left[/ui.heading]"
            )
        self._progress.__enter__()
        self._last = (0, time.perf_counter())
        return self

    def advance(self) -> None:
        """Show that one more step is done."""
        self._steps += 1
        super().advance()

    def state_dict(self) -> tuple[dict, dict[str, Any]]:
        """What a checkpoint holds of it."""
        return {}, {"steps": self._steps, "loss": self._prev_train_loss}

    def load_state_dict(self, arrays: dict, info: dict[str, Any]) -> None:
        """Show the steps that were done before."""
        self._last = (info["steps"], time.perf_counter())
        self._prev_train_loss = info["loss"]
        for _ in range(info["steps"]):
            self.advance()

    def _left(self, it):
        """Time left, from the time that passed since the last line."""
        done, then = self._last
        now = time.perf_counter()
        if it > done:
            self._seconds_per_iter = (now - then) / (it - done)
            self._last = (it, now)
        if self._seconds_per_iter is None:
            return ""
        return format_duration(self._seconds_per_iter * (self._total - it))

    def report_train(self, it: int, metrics: Mapping[str, float]) -> None:
        """Print one line of training metrics."""
        if self._rank != 0:
            return
        loss, before = metrics["loss"], self._prev_train_loss
        arrow, style = ("▲", "yellow") if loss > (before or loss) else ("▼", "green")
        if math.isnan(loss):
            # Every step was skipped.
            arrow, style = " ", "yellow"
        else:
            self._prev_train_loss = loss
        self._console.print(
            f"  [ui.muted]{it:>5}[/ui.muted]  "
            f"[bold {style}]{_number(loss, '.3f'):>6} {arrow}[/bold {style}]"
            f"   {_number(metrics['rewards/accuracies'], '.1%'):>6}"
            f"  {_number(metrics['rewards/margins'], '+.3f'):>7}"
            f"  [ui.strong]{metrics['tokens_per_second']:>6,.0f}[/ui.strong]"
            f"  [ui.muted]{metrics['trained_pairs']:>7,.0f}"
            f"  {self._left(it):>7}[/ui.muted]"
        )

    def report_val(
        self, it: int, metrics: Mapping[str, float], val_time: float
    ) -> None:
        """Print one line of validation metrics."""
        if self._rank != 0:
            return
        if self._last[0] == 0 and it == 0:
            self._last = (0, time.perf_counter())
        likelier = ""
        if "logps/accuracies" in metrics:
            likelier = (
                f"likelier {metrics['logps/accuracies']:.1%},"
                f" per token {metrics['logps/accuracies_per_token']:.1%} · "
            )
        self._console.print(
            f"  [ui.muted]{it:>5}[/ui.muted]  [ui.accent]val[/ui.accent]"
            f" [ui.strong]{metrics['loss']:>5.3f}[/ui.strong]"
            f"  {_number(metrics['rewards/accuracies'], '.1%'):>6}"
            f"  {_number(metrics['rewards/margins'], '+.3f'):>7}"
            f"  [ui.muted]{likelier}{val_time:.1f}s[/ui.muted]"
        )
