# Copyright © 2026 MLX Contributors

"""The table of a test: the start beside one policy, or beside several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

LONGEST_NAME = 16


class Row(NamedTuple):
    """
    A line of the table.

    Args:
        label (str): What it says; ``{}`` takes the number of pairs.
        after (str): Names of the policy's metrics, parted by blanks.
        form (str): How to write them.
        before (str): The name of the start's metric, if it has one.
        total (str): The metric that the label's ``{}`` is.

    Example:
        >>> Row("perplexity", "perplexity/policy", "{:.2f}").before
        ''
    """

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
    """
    Put test metrics side by side.

    Args:
        runs (Mapping): For each run's name what ``pair_metrics`` returned, of the
            same pairs.
        before (str, optional): What they are measured from, ``"start"`` or
            ``"reference"``: the first column, from the first run's numbers. It has
            no reward, for rewards are measured from it. None leaves it out, where
            runs have different ones.
        noun (str): What is counted, see ``Objective.noun``. Default: ``"pairs"``.

    Returns:
        list: Rows of cells; first the head, and in each the label first. Metrics
        that no run has are left out.

    Example:
        >>> metrics = {"pairs": 20.0, "rewards/accuracies": 1.0, "kl": 0.5}
        >>> for row in metrics_table({"policy": metrics}):
        ...     print(row)
        ['test · 20 pairs', 'start', 'policy']
        ['reward accuracy', '-', '100.0%']
        ['KL from it, per token (nats)', '-', '0.5000']
    """
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
    """
    Part a table that is wider than the terminal into several.

    Args:
        table (Sequence): What ``metrics_table`` returned.
        width (int): The terminal's columns.
        fixed (int): So many columns at the left are in all parts. Default: ``2``.

    Returns:
        list: Tables, their cells padded: the first column to the right, others to
        the left.

    Example:
        >>> parts = fit_table([["a", "b", "c", "d"], ["1", "2", "3", "4"]], 12)
        >>> [part[0] for part in parts]
        [['a', '  b', '  c', '  d']]
        >>> len(fit_table([["a", "b", "c", "d"]], 8))
        2
    """
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
    """
    Short names for the columns of some runs.

    Args:
        folders (Sequence): Their adapter folders, all different.

    Returns:
        list: The folders' last parts, or of equal ones the ends of the whole paths,
        with numbers where these are still equal.

    Example:
        >>> short_names(["runs/a", "runs/b"]), short_names(["x/run", "y/run"])
        (['a', 'b'], ['x/run', 'y/run'])
    """
    names = [Path(folder).name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder).rstrip("/") for folder in folders]
    cut = LONGEST_NAME - 1
    names = [n if len(n) <= LONGEST_NAME else f"…{n[-cut:]}" for n in names]
    if len(set(names)) == len(names):
        return names
    return [f"{i} {n[-cut + 2 :]}" for i, n in enumerate(names, 1)]
