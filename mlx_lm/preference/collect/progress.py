# Copyright © 2026 MLX Contributors

"""How far the answers to prompts are, how fast, and what time is left."""

import time
from collections.abc import Sequence
from typing import Any

from ...cli_ui import SquareBar, make_console
from ..data.notes import counted
from ..run.screen import format_duration
from ..terminal import rprint
from .answers import STOP

# Less of the expected tokens tells no time that is left.
EVIDENCE = 0.05
# Seconds between lines of progress where there is no terminal.
QUIET_SECONDS = 30.0


def seconds_left(
    seconds: float, tokens: int, stopped: int, answers: int, most: int
) -> float | None:
    """Time for the rest of some answers; None before there is anything to tell it by."""
    # The first to end are the short ones, so lengths are told by how often a token is
    # the last one: with probability p, one of at most N has (1 - (1 - p)^N) / p.
    ending = stopped / max(tokens, 1)
    length = (1 - (1 - ending) ** most) / ending if ending else most
    rest = answers * length - tokens
    if tokens < EVIDENCE * answers * length:
        return None
    return max(rest, 0) * seconds / tokens


class AnswerProgress:
    """A bar with tokens a second and time left; lines now and then without a terminal."""

    def __init__(self, total: int, most: int):
        from rich.progress import Progress, TextColumn

        self._total, self._most = total, most
        self._answers = self._tokens = self._stopped = 0
        self._start = self._shown = time.perf_counter()
        console = make_console()
        self._is_live = console.is_terminal
        self._bar = Progress(
            TextColumn("[bold blue]{task.description}[/bold blue]"),
            SquareBar(bar_width=30),
            TextColumn("[progress.percentage]{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not (self._is_live and total),
        )
        self._task = self._bar.add_task("answers", total=total or None, text="")

    def __enter__(self) -> "AnswerProgress":
        self._bar.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._bar.__exit__(*exc)
        if self._answers and not self._is_live:
            rprint(self._text())

    def add(self, tokens: int, ends: Sequence[str]) -> None:
        """Count new tokens, and why the answers ended that did with one of them."""
        self._tokens += tokens
        self._answers += len(ends)
        self._stopped += sum(end == STOP for end in ends)
        self._bar.update(self._task, completed=self._answers, text=self._text())
        now = time.perf_counter()
        if not self._is_live and now - self._shown > QUIET_SECONDS:
            self._shown = now
            rprint(self._text())

    def _text(self):
        seconds = max(time.perf_counter() - self._start, 1e-9)
        text = f"{self._answers:,}/{counted(self._total, 'answer')}"
        text += f" · {self._tokens / seconds:,.0f} tok/s"
        left = seconds_left(
            seconds, self._tokens, self._stopped, self._total, self._most
        )
        return text if left is None else f"{text} · {format_duration(left)} left"
