# Copyright © 2026 MLX Contributors

"""The curves of a run, as SVG that follows the page's colours and as PNG.

Matplotlib draws them; it is only imported where something is drawn.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import replace_file

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
# Inches: small on the page, so that its texts have the size of the page's.
_ON_PAGE, _IN_PNG = (3.4, 2.1), (4.6, 2.8)


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
    percent: bool = False


# Title, unit, metric, and for each line its part of the metric's name and colour.
_PLAIN = (("", "one"),)
_BOTH = (("chosen", "one"), ("rejected", "two"))
CURVES = (
    ("Loss", "nats", "loss", _PLAIN),
    ("Reward accuracy", "%", "rewards/accuracies", _PLAIN),
    ("Reward margin", "nats", "rewards/margins", _PLAIN),
    ("Rewards", "nats", "rewards/{}", _BOTH),
    ("Log-probs of the answers", "nats", "logps/{}", _BOTH),
    ("KL from the reference, estimated", "nats", "kl_estimate", _PLAIN),
    ("Gradient norm", "", "grad_norm", _PLAIN),
    ("Learning rate", "", "learning_rate", _PLAIN),
    ("Speed", "tokens/s", "tokens_per_second", _PLAIN),
    ("Peak memory", "GB", "peak_memory", _PLAIN),
)


def curves(reports: list[dict[str, Any]]) -> list[Chart]:
    """Sort a run's reports into charts."""
    charts = []
    for title, unit, metric, lines in CURVES:
        chart = Chart(title, unit, percent=unit == "%")
        for name, color in lines:
            for part in ("training", "validation"):
                held_out = part == "validation"
                key = ("val_" if held_out else "") + metric.format(name)
                points = [(r["iteration"], r[key]) for r in reports if key in r]
                if not points:
                    continue
                scale = 100 if chart.percent else 1
                # One metric: colours tell the parts; two: dashes do.
                shade = color if name or not held_out else "two"
                label = (name + " (val.)" * held_out) if name else part
                x = [it for it, _ in points]
                y = [math.nan if v is None else v * scale for _, v in points]
                chart.series.append(Series(label, x, y, shade, held_out))
        if chart.series:
            charts.append(chart)
    return charts


def svg(draw: Any, prefix: str) -> str:
    """Draw one picture as SVG that takes its colours from CSS variables."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Texts stay texts, and the same run gives the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure = Figure(_ON_PAGE, layout="constrained")
        draw(figure.subplots(), _STAND_INS)
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


def draw_curves(axes: Any, colors: dict[str, str], chart: Chart) -> None:
    """Draw a chart's lines."""
    for series in chart.series:
        few = len(series.x) <= 30
        axes.plot(
            series.x,
            series.y,
            color=colors[series.color],
            label=series.name,
            linewidth=1.5,
            linestyle=(0, (4, 2)) if series.held_out else "-",
            marker="o" if series.held_out or few else None,
            markersize=3.5 if series.held_out else 2.5,
        )
    _style(axes, colors, "iteration", chart.unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(chart.series) > 1 or chart.series[0].held_out:
        _legend(axes, colors, len(chart.series))


def draw_histogram(
    axes: Any,
    colors: dict[str, str],
    before: Sequence[float],
    after: Sequence[float],
    start: str = "before",
) -> None:
    """Draw the margins of all pairs, before and after, over the same bins."""
    for name, values, color in ((start, before, "two"), ("after", after, "one")):
        bins = min(5 + math.isqrt(len(values)), 30)
        shared = {"bins": bins, "range": _range([*before, *after]), "label": name}
        kept = [v for v in values if math.isfinite(v)]
        axes.hist(kept, color=colors[color], alpha=0.35, **shared)
        shared.pop("label")
        axes.hist(kept, histtype="step", color=colors[color], linewidth=1.2, **shared)
    axes.axvline(0, color=colors["ink"], linewidth=0.8, linestyle=":")
    _style(axes, colors, "log p(chosen) - log p(rejected), nats", "pairs")
    _legend(axes, colors, 2)


def _range(values):
    finite = sorted(v for v in values if math.isfinite(v)) or [0.0]
    # A few extreme pairs must not squeeze all others into one bar.
    low, high = finite[len(finite) // 200], finite[-1 - len(finite) // 200]
    return (low, high) if high > low else (low - 1, high + 1)


def draw_reliability(
    axes: Any,
    colors: dict[str, str],
    confidence: Sequence[float | None],
    accuracy: Sequence[float | None],
) -> None:
    """Draw how often a policy is right against how sure it is."""
    pairs = zip(confidence, accuracy)
    bins = [(100 * x, 100 * y) for x, y in pairs if x is not None and y is not None]
    x, y = ([bin[i] for bin in bins] for i in (0, 1))
    ideal = {"color": colors["muted"], "linewidth": 1, "linestyle": ":"}
    axes.plot([50, 100], [50, 100], label="calibrated", **ideal)
    style = {"color": colors["one"], "linewidth": 1.5, "marker": "o", "markersize": 3.5}
    axes.plot(x, y, label="policy", **style)
    axes.set_ylim(min([*y, 45]) - 5, 105)
    _style(axes, colors, "confidence, %", "right pairs, %")
    _legend(axes, colors, 2)


def _style(axes, colors, x_label, y_label):
    axes.set_xlabel(x_label, color=colors["muted"], fontsize=8)
    axes.set_ylabel(y_label, color=colors["muted"], fontsize=8)
    axes.tick_params(colors=colors["muted"], labelsize=8, length=0)
    axes.grid(axis="y", color=colors["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colors["grid"])
    for offset in (axes.xaxis, axes.yaxis):
        offset.get_offset_text().set_color(colors["muted"])
        offset.get_offset_text().set_fontsize(8)


def _legend(axes, colors, columns):
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2 if columns > 2 else columns,
        frameon=False,
        fontsize=8,
        labelcolor=colors["ink"],
        borderaxespad=0.2,
        handlelength=1.8,
        columnspacing=1.2,
    )


def write_png(charts: list[Chart], path: str | Path, title: str) -> None:
    """Draw all charts into one picture."""
    from matplotlib.figure import Figure

    rows = -(-len(charts) // 2)
    size = (2 * _IN_PNG[0], rows * _IN_PNG[1] + 0.4)
    figure = Figure(size, layout="constrained", facecolor="white", dpi=110)
    # A $ in a name is no formula.
    figure.suptitle(title, color=PAPER["ink"], fontsize=11, parse_math=False)
    cells = figure.subplots(rows, 2, squeeze=False).flat
    for chart, cell in zip(charts, cells):
        draw_curves(cell, PAPER, chart)
        cell.set_title(
            chart.title,
            loc="left",
            color=PAPER["ink"],
            fontsize=9,
            fontweight="bold",
            pad=34 if len(chart.series) > 2 else 20,
        )
    for cell in list(cells):
        cell.set_visible(False)
    replace_file(path, lambda name: figure.savefig(name, format="png"))
