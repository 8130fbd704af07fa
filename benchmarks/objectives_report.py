# Copyright © 2026 MLX Contributors

"""The table of ``objectives_benchmark.py``, and its place in the README."""

import os
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from dpo_report import machine

from mlx_lm.preference.files import replace_file
from mlx_lm.preference.measure.pair_metrics import wilson_interval
from mlx_lm.preference.measure.pair_scores import CHOSEN, REJECTED, ScoredPairs

TITLE = "## Objectives"
START = "start"
HEAD = (
    "| objective | settings | accuracy | 95 % | likelier | margin | chosen "
    "| KL | tokens |\n|---|---|---|---|---|---|---|---|---|"
)
LEGEND = """\
*settings*: what differs from the quickstart's loss and beta. *accuracy*: pairs whose
chosen answer gained more log-prob from the start than the rejected one did, with
Wilson's interval. *likelier*: pairs whose chosen answer has the larger log-prob. Means
over pairs, in nats and without beta, so that all rows compare: *margin*, the chosen
answer's log-ratio to the start minus the rejected one's; *chosen*, the chosen answer's
log-ratio; *KL*, the exact KL from the start, summed over a chosen answer. *tokens*: the
mean length of greedy answers."""

NOTES = """So early, losses of log-ratios mostly have `sigmoid`'s gradient but for its size, which
Adam takes away: they part when beta times the margin nears 1. `plackett_luce` of two
answers is `sigmoid`. `discopop` sets out the wrong way, as its formula has it: at the
start its slope is (1 - log 2) / (4 `discopop_tau`) - 3 / 4, which is above 0 for a
`discopop_tau` below 0.102. `apo_down` lowers both answers by design. Without a
reference `sft`, `orpo` and `cpo` raise the chosen answers' likelihood first."""


def describe(pairs: ScoredPairs) -> dict[str, float]:
    """What the table says of a test, from the scores of every pair."""
    ratios = pairs.policy_logps - pairs.reference_logps
    margins = ratios[:, CHOSEN] - ratios[:, REJECTED]
    share = float((margins > 0).mean())
    low, high = wilson_interval(share, len(pairs))
    likelier = pairs.policy_logps[:, CHOSEN] > pairs.policy_logps[:, REJECTED]
    return {
        "pairs": len(pairs),
        "accuracy": share,
        "low": low,
        "high": high,
        "likelier": float(likelier.mean()),
        "margin": float(margins.mean()),
        "chosen": float(ratios[:, CHOSEN].mean()),
        "kl": float(pairs.kl[:, CHOSEN].mean()),
    }


def row(name: str, run: dict[str, Any]) -> str:
    """One line of the table."""
    settings = ", ".join(f"{k} {v}" for k, v in run["settings"].items())
    lengths = f"{np.mean(run['lengths']):.1f}" if run["lengths"] else "-"
    start = name == START
    cells = [
        name if start or " " in name else f"`{name}`",
        settings,
        "-" if start else f"{run['accuracy']:.1%}",
        "-" if start else f"{100 * run['low']:.0f} - {100 * run['high']:.0f}",
        f"{run['likelier']:.1%}",
        f"{run['margin']:.2f}",
        f"{run['chosen']:+.2f}",
        f"{run['kl']:.2f}",
        lengths,
    ]
    return f"| {' | '.join(cells)} |"


def section(results: dict[str, Any], names: list[str], how: str) -> str:
    """The README's section, its rows in the order of ``names``."""
    where = machine(f"{os.cpu_count()} CPU cores", "mlx", "mlx-lm")
    budget, runs = results["budget"], results["runs"]
    pairs = next(iter(runs.values()))["pairs"]
    budget_text = (
        f"Every objective on the quickstart's pairs, from the same start and with the "
        f"same budget: {budget['iters']} steps of {budget['batch_size']} pairs "
        f"(`kto`: {2 * budget['batch_size']} labelled answers), adapters on "
        f"{budget['num_layers']} layers, learning rate {budget['learning_rate']:g}, "
        f"beta 0.1 unless *settings* says another. Tested on {pairs} held-out pairs "
        f"and on {budget['prompts']} of their prompts, answered with at most "
        f"{budget['max_tokens']} tokens. One seed and a short run: rows that differ by "
        f"less than the interval are no ranking."
    )
    fill = partial(textwrap.fill, width=88, break_on_hyphens=False)
    text = f"{TITLE}\n\n{fill(f'`{how}`, {where}.')}\n\n{fill(budget_text)}\n\n"
    rows = "".join(f"{row(name, runs[name])}\n" for name in names)
    return f"{text}{LEGEND}\n\n{HEAD}\n{rows}\n{NOTES}\n"


def write_section(path: Path, text: str) -> None:
    """Put the section into a Markdown file, in the place of an earlier one."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    starts = [i for i, line in enumerate(lines) if line.startswith("## ")]
    mine = [i for i in starts if lines[i].strip() == TITLE]
    begin = mine[0] if mine else len(lines)
    end = min((i for i in starts if i > begin), default=len(lines))
    before = "".join(lines[:begin]).rstrip() + "\n\n"
    after = "".join(lines[end:])
    content = before + text + ("\n" + after if after else "")
    replace_file(path, lambda name: Path(name).write_text(content, "utf-8"))
