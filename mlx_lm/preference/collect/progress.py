# Copyright © 2026 MLX Contributors

"""How far answers and their judges are, how fast, and what time is left."""

import time
from collections.abc import Sequence
from typing import Any, Self

from ...cli_ui import SquareBar, make_console
from ..run.screen import format_duration
from ..terminal import counted, rprint
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


class Progress:
    """A bar with a text behind it; without a terminal, the text now and then."""

    def __init__(self, name: str, total: int):
        from rich.progress import Progress as Bar
        from rich.progress import TextColumn

        self._total, self._done = total, 0
        self._start = self._shown = time.perf_counter()
        console = make_console()
        self._is_live = console.is_terminal
        self._bar = Bar(
            TextColumn("[bold blue]{task.description}[/bold blue]"),
            SquareBar(bar_width=30),
            TextColumn("[progress.percentage]{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not (self._is_live and total),
        )
        self._task = self._bar.add_task(name, total=total or None, text="")

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._bar.__exit__(*exc)
        if self._done and not self._is_live:
            rprint(self._text())

    def _text(self) -> str:
        raise NotImplementedError

    def _show(self):
        self._bar.update(self._task, completed=self._done, text=self._text())
        now = time.perf_counter()
        is_due = now - self._shown > QUIET_SECONDS and self._done < self._total
        if is_due and not self._is_live:
            self._shown = now
            rprint(self._text())

    def _seconds(self) -> float:
        return max(time.perf_counter() - self._start, 1e-9)

    def _ended(self, text: str, left: float | None) -> str:
        """A text with the time that is left, or that all took."""
        if self._done >= self._total:
            return f"{text} · {format_duration(self._seconds())}"
        return text if left is None else f"{text} · {format_duration(left)} left"


class AnswerProgress(Progress):
    """How many answers there are, with tokens a second."""

    def __init__(self, total: int, most: int):
        super().__init__("answers", total)
        self._most = most
        self._tokens = self._stopped = 0

    def add(self, tokens: int, ends: Sequence[str]) -> None:
        """Count new tokens, and why the answers ended that did with one of them."""
        self._tokens += tokens
        self._done += len(ends)
        self._stopped += sum(end == STOP for end in ends)
        self._show()

    def _text(self):
        seconds = self._seconds()
        text = f"{self._done:,}/{counted(self._total, 'answer')}"
        text += f" · {self._tokens / seconds:,.0f} tok/s"
        left = seconds_left(
            seconds, self._tokens, self._stopped, self._total, self._most
        )
        return self._ended(text, left)


class JudgeProgress(Progress):
    """How many prompts are judged."""

    def __init__(self, total: int):
        super().__init__("judge", total)

    def add(self) -> None:
        """Count a prompt."""
        self._done += 1
        self._show()

    def _text(self):
        left = self._seconds() / max(self._done, 1) * (self._total - self._done)
        text = f"{self._done:,}/{counted(self._total, 'prompt')} judged"
        return self._ended(text, left)
