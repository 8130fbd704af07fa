# Copyright © 2026 MLX Contributors

"""The table of a test: the start beside one policy, or beside several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ...cli_ui import Text

LONGEST_NAME = 16


class Row(NamedTuple):
    """A line of the table."""

    label: str
    after: str
    form: str
    before: str = ""
    total: str = ""


def _by_length(name, before=""):
    return [
        Row(
            f"  {label} (n = {{}})",
            f"{name}/{group}",
            "{:.1%}",
            f"{before}/{group}" if before else "",
            f"pairs/{group}",
        )
        for group, label in (
            ("chosen_shorter", "chosen is shorter"),
            ("equal_length", "about as long"),
            ("chosen_longer", "chosen is longer"),
        )
    ]


ROWS = (
    Row("reward accuracy", "rewards/accuracies", "{:.1%}"),
    Row(
        "  95 % interval",
        "rewards/accuracies_low rewards/accuracies_high",
        "{:.1%}-{:.1%}",
    ),
    *_by_length("rewards/accuracies"),
    Row("reward margin (nats)", "rewards/margins", "{:.3f}"),
    Row("reward of chosen (nats)", "rewards/chosen", "{:.3f}"),
    Row("reward of rejected (nats)", "rewards/rejected", "{:.3f}"),
    Row(
        "chosen likelier than rejected",
        "logps/accuracies",
        "{:.1%}",
        "reference_logps/accuracies",
    ),
    *_by_length("logps/accuracies", "reference_logps/accuracies"),
    Row(
        "chosen likelier, per token",
        "logps/accuracies_per_token",
        "{:.1%}",
        "reference_logps/accuracies_per_token",
    ),
    Row("perplexity of chosen", "perplexity/policy", "{:.2f}", "perplexity/reference"),
    Row(
        "perplexity of ordinary text",
        "retained_text/after",
        "{:.2f}",
        "retained_text/before",
    ),
    Row("KL from it, per token (nats)", "kl", "{:.4f}"),
    Row("  per chosen answer (nats)", "kl_per_answer/chosen", "{:.3f}"),
    Row("  per rejected answer (nats)", "kl_per_answer/rejected", "{:.3f}"),
    Row(
        "calibration error (ECE)",
        "calibration/ece",
        "{:.3f}",
        "reference_calibration/ece",
    ),
    Row("Brier score", "calibration/brier", "{:.3f}", "reference_calibration/brier"),
)


def metrics_table(
    runs: Mapping[str, Mapping[str, Any]],
    before: str | None = "start",
    noun: str = "pairs",
) -> list[list[str]]:
    """Put test metrics side by side."""
    first = next(iter(runs.values()))
    start = [before] if before else []
    table = [[f"test · {first['pairs']:,.0f} {noun}", *start, *runs]]
    for row in ROWS:
        if not any(name in run for run in runs.values() for name in row.after.split()):
            continue
        cells = [_cell(row.form, run, row.after.split()) for run in runs.values()]
        own = before != "reference" or not row.before.startswith("retained_text")
        start = [_cell(row.form, first, [row.before] if own else [""])]
        count = f"{first.get(row.total, 0):,}" if row.total else ""
        table.append([row.label.format(count), *(start if before else []), *cells])
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
