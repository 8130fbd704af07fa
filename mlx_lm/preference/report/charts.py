# Copyright © 2026 MLX Contributors

"""The curves of a run, drawn by Matplotlib as SVG in the page's colours and as PNG."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import replace_file
from .shown import METRICS

# Roles of colours on white paper. SVG gets a stand-in for each, which becomes a
# CSS variable: the page then decides.
PAPER = {
    "ink": "#1f2328",
    "muted": "#656d76",
    "grid": "#e4e7eb",
    "one": "#2563c9",
    "two": "#c2570c",
}
_STAND_INS = {role: f"#0102{i:02x}" for i, role in enumerate(PAPER, 10)}
Colors = dict[str, str]


@dataclass
class Series:
    """One line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = "one"
    held_out: bool = False


@dataclass
class Chart:
    """What one picture shows."""

    title: str
    unit: str = ""
    series: list[Series] = field(default_factory=list)


def curves(reports: list[dict[str, Any]]) -> list[Chart]:
    """Sort a run's reports into charts."""
    charts: dict[str, Chart] = {}
    for metric in METRICS:
        title, unit = metric.chart
        for part, prefix in (("training", ""), ("validation", "val_")):
            key, held_out = prefix + metric.name, bool(prefix)
            points = [(r["iteration"], r[key]) for r in reports if key in r]
            if not points or not title:
                continue
            x, scale = [it for it, _ in points], 100 if unit == "%" else 1
            y = [math.nan if v is None else v * scale for _, v in points]
            # One metric: colours tell the parts; two: dashes do.
            label, second = part, held_out
            answer = metric.name.rpartition("/")[2]
            if answer in ("chosen", "rejected"):
                label = answer + " (val.)" * held_out
                second = answer == "rejected"
            line = Series(label, x, y, "two" if second else "one", held_out)
            charts.setdefault(title, Chart(title, unit)).series.append(line)
    return list(charts.values())


def svg(draw: Any, prefix: str, **what: Any) -> str:
    """Draw one picture as SVG that takes its colours from CSS variables."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Texts stay texts, and the same run gives the same file.
    settings = {"svg.fonttype": "none", "svg.hashsalt": prefix}
    with rc_context(_style(_STAND_INS) | settings):
        # Inches: small on the page, so that its texts have the size of the page's.
        figure = Figure((3.4, 2.1), layout="constrained")
        draw(figure.subplots(), _STAND_INS, **what)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for role, color in _STAND_INS.items():
        text = text.replace(color, f"var(--{role})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"\1\2", text)


def draw_curves(axes: Any, colors: Colors, chart: Chart) -> None:
    """Draw a chart's lines."""
    for series in chart.series:
        few = len(series.x) <= 30
        axes.plot(
            series.x,
            series.y,
            color=colors[series.color],
            label=series.name,
            linestyle=(0, (4, 2)) if series.held_out else "-",
            marker="o" if series.held_out or few else None,
            markersize=3.5 if series.held_out else 2.5,
        )
    axes.set(xlabel="iteration", ylabel=chart.unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(chart.series) > 1 or chart.series[0].held_out:
        axes.legend(bbox_to_anchor=(0, 1), ncols=min(len(chart.series), 2))


def draw_histogram(
    axes: Any, colors: Colors, before: Sequence, after: Sequence, start: str = "before"
) -> None:
    """Draw the margins of all pairs, before and after, over the same bins."""
    finite = sorted(v for v in [*before, *after] if math.isfinite(v)) or [0.0]
    # A few extreme pairs must not squeeze all others into one bar.
    low, high = finite[len(finite) // 200], finite[-1 - len(finite) // 200]
    span = (low, high) if high > low else (low - 1, high + 1)
    for name, values, color in ((start, before, "two"), ("after", after, "one")):
        shared = {"bins": min(5 + math.isqrt(len(values)), 30), "range": span}
        kept = [v for v in values if math.isfinite(v)]
        axes.hist(kept, color=colors[color], alpha=0.35, label=name, **shared)
        axes.hist(kept, histtype="step", color=colors[color], linewidth=1.2, **shared)
    axes.axvline(0, color=colors["ink"], linewidth=0.8, linestyle=":")
    axes.set(xlabel="log p(chosen) - log p(rejected), nats", ylabel="pairs")
    axes.legend(bbox_to_anchor=(0, 1), ncols=2)


def draw_reliability(
    axes: Any, colors: Colors, confidence: Sequence, accuracy: Sequence
) -> None:
    """Draw how often a policy is right against how sure it is."""
    pairs = zip(confidence, accuracy)
    bins = [(100 * x, 100 * y) for x, y in pairs if x is not None and y is not None]
    x, y = ([bin[i] for bin in bins] for i in (0, 1))
    ideal = {"color": colors["muted"], "linewidth": 1, "linestyle": ":"}
    axes.plot([50, 100], [50, 100], label="calibrated", **ideal)
    axes.plot(x, y, label="policy", color=colors["one"], marker="o", markersize=3.5)
    axes.set_ylim(min([*y, 45]) - 5, 105)
    axes.set(xlabel="confidence, %", ylabel="right pairs, %")
    axes.legend(bbox_to_anchor=(0, 1), ncols=2)


def _style(colors):
    """What all charts look like, as matplotlib's settings."""
    shared = {
        "axes.labelsize xtick.labelsize ytick.labelsize legend.fontsize": 8,
        "axes.labelcolor xtick.color ytick.color": colors["muted"],
        "axes.titlecolor legend.labelcolor": colors["ink"],
        "axes.edgecolor grid.color": colors["grid"],
        "axes.spines.left axes.spines.top axes.spines.right legend.frameon": False,
        "axes.grid axes.axisbelow": True,
        "xtick.major.size ytick.major.size": 0,
    }
    return {name: v for names, v in shared.items() for name in names.split()} | {
        "axes.grid.axis": "y",
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.5,
        "legend.loc": "lower left",
        "legend.borderaxespad": 0.2,
        "legend.handlelength": 1.8,
        "legend.columnspacing": 1.2,
    }


def write_png(charts: list[Chart], path: str | Path, title: str) -> None:
    """Draw all charts into one picture."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = -(-len(charts) // 2)
    size = (9.2, rows * 2.8 + 0.4)
    with rc_context(_style(PAPER)):
        figure = Figure(size, layout="constrained", facecolor="white", dpi=110)
        # A $ in a name is no formula.
        figure.suptitle(title, color=PAPER["ink"], fontsize=11, parse_math=False)
        cells = figure.subplots(rows, 2, squeeze=False).flat
        for chart, cell in zip(charts, cells):
            draw_curves(cell, PAPER, chart)
            cell.set_title(chart.title, pad=34 if len(chart.series) > 2 else 20)
        for cell in list(cells):
            cell.set_visible(False)
        replace_file(path, lambda name: figure.savefig(name, format="png"))
