# Copyright © 2026 MLX Contributors

"""The table of a test: the start beside one policy, or beside several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..terminal import counted, visible
from .shown import METRICS

LONGEST_NAME = 16


def metrics_table(
    runs: Mapping[str, Mapping[str, Any]],
    before: str | None = "start",
    noun: str = "pairs",
) -> list[list[str]]:
    """Put test metrics side by side."""
    first = next(iter(runs.values()))
    start = [before] if before else []
    count = counted(round(first["pairs"]), noun.removesuffix("s"))
    table = [[f"test · {count}", *start, *runs]]
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


def short_names(folders: Sequence[str]) -> list[str]:
    """Short names for the columns of some runs."""
    folders = [visible(folder, "") for folder in folders]
    names = [Path(folder).name for folder in folders]
    if len(set(names)) < len(names):
        names = [folder.rstrip("/") for folder in folders]
    cut = LONGEST_NAME - 1
    names = [n if len(n) <= LONGEST_NAME else f"…{n[-cut:]}" for n in names]
    if len(set(names)) == len(names):
        return names
    return [f"{i} {n[-cut + 2 :]}" for i, n in enumerate(names, 1)]


def print_test_table(
    console: Console, table: Sequence[Sequence[str]], fixed: int = 2
) -> None:
    """Print a table of test metrics, in parts if it is wider than the terminal."""
    columns = list(zip(*table))
    first, runs = columns[:fixed], columns[fixed:]
    while runs:
        for size in range(len(runs), 0, -1):
            grid = _grid(console, first, runs[:size])
            if grid.width <= console.width:
                break
        runs = runs[size:]
        # Rather too wide than cut off.
        console.print(grid, crop=False)
        if runs:
            console.print()


def _grid(console, first, runs):
    grid = Table(box=None, padding=(0, 0, 0, 2), header_style="ui.heading")
    for i, (head, *_) in enumerate([*first, *runs]):
        style, side = "ui.strong" if i >= len(first) else "", "right" if i else "left"
        grid.add_column(Text(head), justify=side, style=style, no_wrap=True)
    for row in list(zip(*first, *runs))[1:]:
        # Not as markup: a folder's name may hold brackets.
        grid.add_row(*map(Text, row))
    endless = console.options.update(max_width=10**4)
    grid.width = console.measure(grid, options=endless).maximum
    return grid
