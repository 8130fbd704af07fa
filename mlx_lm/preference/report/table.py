# Copyright © 2026 MLX Contributors

"""The table of a test: the start beside one policy, or beside several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ...cli_ui import Text
from ..measure.metrics import METRICS

LONGEST_NAME = 16


def metrics_table(
    runs: Mapping[str, Mapping[str, Any]],
    before: str | None = "start",
    noun: str = "pairs",
) -> list[list[str]]:
    """Put test metrics side by side."""
    first = next(iter(runs.values()))
    start = [before] if before else []
    table = [[f"test · {first['pairs']:,.0f} {noun}", *start, *runs]]
    for metric in METRICS:
        names = metric.name.split()
        if not metric.row or not any(n in run for run in runs.values() for n in names):
            continue
        cells = [_cell(metric.form, run, names) for run in runs.values()]
        # Another model is no earlier state of the one that read the text.
        own = before != "reference" or not metric.start.startswith("retained_text")
        start = [_cell(metric.form, first, [metric.start if own else ""])]
        count = f"{first.get(metric.total, 0):,}" if metric.total else ""
        table.append([metric.row.format(count), *(start if before else []), *cells])
    return table


def _cell(form, metrics, names):
    values = [metrics.get(name) for name in names]
    return "-" if None in values else form.format(*values)


def fit_table(
    table: Sequence[Sequence[str]], width: int, fixed: int = 2
) -> list[list[list[str]]]:
    """Part a table that is wider than the terminal into several."""
    columns = list(zip(*table))
    widths = [max(map(len, column)) + 2 for column in columns]
    widths[0] -= 2
    room = width - sum(widths[:fixed])
    parts: list[list[int]] = [[]]
    for i in range(fixed, len(columns)):
        if parts[-1] and sum(widths[j] for j in [*parts[-1], i]) > room:
            parts.append([])
        parts[-1].append(i)
    return [
        [
            [
                row[i].rjust(widths[i]) if i else row[i].ljust(widths[i])
                for i in [*range(fixed), *part]
            ]
            for row in table
        ]
        for part in parts
    ]


def short_names(folders: Sequence[str]) -> list[str]:
    """Short names for the columns of some runs."""
    names = [Path(folder).name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder).rstrip("/") for folder in folders]
    cut = LONGEST_NAME - 1
    names = [n if len(n) <= LONGEST_NAME else f"…{n[-cut:]}" for n in names]
    if len(set(names)) == len(names):
        return names
    return [f"{i} {n[-cut + 2 :]}" for i, n in enumerate(names, 1)]


def print_test_table(console: Console, parts: list[list[list[str]]]) -> None:
    """Print a table of test metrics."""
    for part in parts:
        for i, (label, before, *cells) in enumerate(part):
            style = "ui.heading" if i == 0 else ""
            line = Text.assemble(
                (f"  {label}{before}", style), ("".join(cells), "ui.strong")
            )
            console.print(line, no_wrap=True, crop=False)
        if part is not parts[-1]:
            console.print()
