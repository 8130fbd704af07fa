# Copyright © 2026 MLX Contributors

"""Single pairs on a terminal: the text that a model sees and what it says of it."""

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.text import Text

from ...cli_ui import make_console
from ..data.tokenizer import plain_ids
from ..files import write_json
from ..measure.pair_metrics import preference_probabilities
from ..measure.pair_scores import CHOSEN, REJECTED, ScoredPairs
from ..terminal import visible

PROMPT_LINES = 6
ANSWER_LINES = 10
CUT_LINES = 2
WIDEST = 100


def inspection_order(margins: np.ndarray, count: int) -> list[int]:
    """Which pairs to look at: the surest mistakes first, then the least sure rest."""
    margins = np.where(np.isnan(margins), -math.inf, margins)
    return np.argsort(margins, kind="stable")[:count].tolist()


def _marked(text):
    """Write out what a terminal would obey, and show where lines end."""
    return visible(text.replace("\r\n", "\n")).replace("\n", "↵\n")


def _wrapped(text, width, most, from_end=False):
    """Indented lines, of which the middle, or the start, may be left out."""
    console = Console(width=width, color_system=None)
    lines = [
        line.plain.rstrip()
        for paragraph in _marked(text).split("\n")
        for line in (Text(paragraph).wrap(console, width - 4) or [Text("")])
    ]
    while lines and not lines[-1]:
        lines.pop()
    if len(lines) > most:
        note = f"[… {len(lines) - most + 1} lines …]"
        head = 0 if from_end else (2 * most) // 3
        tail = most - 1 - head
        lines = lines[:head] + [note] + lines[len(lines) - tail :]
    return [f"    {line}".rstrip() for line in lines]


def _numbers(pairs, i):
    lines = ["              policy   reference     reward   tokens  per token"]
    for column, name in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
        policy, tokens = pairs.policy_logps[i, column], pairs.tokens[i, column]
        lines.append(
            f"  {name:<8}{policy:>10.2f}{pairs.reference_logps[i, column]:>12.2f}"
            f"{pairs.rewards[i, column]:>+11.3f}{tokens:>9,}"
            f"{policy / max(tokens, 1):>11.3f}"
        )
    return lines


def inspection_lines(
    dataset: Any, pairs: ScoredPairs, whole: dict[int, tuple], width: int = 80
) -> list[str]:
    """Show pairs: decoded tokens, special ones included, and what is said of them."""
    decode = lambda ids: dataset.tokenizer.decode(plain_ids(ids).tolist())
    lines: list[str] = []
    probabilities = preference_probabilities(pairs.margins)
    for i, index in enumerate(pairs.indices.tolist()):
        prompt, *answers, _ = dataset[index]
        uncut, margin = whole.get(index, dataset[index])[1:3], pairs.margins[i]
        head = (
            f"{i + 1} of {len(pairs)} · {'right' if margin > 0 else 'WRONG'} · "
            f"margin {margin:+.3f} · P(chosen) {probabilities[i]:.1%} · "
        )
        room, place = width - len(head), dataset.source_row(index)
        place = visible(place if isinstance(place, str) else f"row {place}")
        place = place if len(place) <= room else f"…{place[len(place) - room + 1 :]}"
        lines += [head + place, *_numbers(pairs, i)]
        lines.append(f"  prompt, {len(prompt):,} tokens, not scored")
        lines += _wrapped(decode(prompt), width, PROMPT_LINES, from_end=True)
        for name, kept, full in zip(("chosen", "rejected"), answers, uncut):
            others = sum(int(token) < 0 for token in kept)
            but = f" but for {others:,} tokens of other turns" if others else ""
            lines.append(f"  {name}, scored{but}")
            lines += _wrapped(decode(kept), width, ANSWER_LINES)
            if len(cut := full[len(kept) :]):
                lines.append(f"  cut off: {len(cut):,} tokens")
                lines += _wrapped(decode(cut), width, CUT_LINES)
        lines.append("")
    return lines


def uncut_pairs(
    dataset: Any, indices: Sequence[int], read_uncut: Callable[[], Any]
) -> dict[int, tuple]:
    """Find the whole of pairs that may have been cut, in their data read once more."""
    long = [i for i in indices if max(dataset[i][3]) >= dataset.max_length]
    if not long:
        return {}
    # The same lines were printed when the data was read first.
    with contextlib.redirect_stdout(io.StringIO()):
        sets = read_uncut()
    wanted: dict[str | int, list[int]] = {}
    for i in long:
        wanted.setdefault(dataset.source_row(i), []).append(i)
    found: dict[int, tuple] = {}
    for other in sets:
        for place in range(len(other)):
            for i in wanted.get(other.source_row(place), []):
                if _begins(other[place], dataset[i]):
                    found.setdefault(i, other[place])
    return found


def _begins(whole, cut):
    """Whether a pair is the start of another one: one place may hold several."""
    return np.array_equal(whole[0], cut[0]) and all(
        np.array_equal(a[: len(b)], b) for a, b in zip(whole[1:3], cut[1:3])
    )


def show_pairs(
    dataset: Any, scored: ScoredPairs, count: int, read_uncut: Callable[[], Any]
) -> None:
    """Show single pairs of a data set, the surest mistakes first."""
    if mx.distributed.init().rank() != 0:
        return
    chosen = scored.select(inspection_order(scored.margins, count))
    whole = uncut_pairs(dataset, chosen.indices.tolist(), read_uncut)
    console = make_console()
    console.print()
    for line in inspection_lines(dataset, chosen, whole, min(console.width, WIDEST)):
        # Not as markup: a row may hold brackets.
        console.print(Text(line), no_wrap=True, crop=False)


FILE_NAME = "test_pairs.json"
SHOWN = 10
LONGEST = 2000  # characters


def pick_pairs(dataset: Any, pairs: ScoredPairs) -> list[dict[str, Any]]:
    """Decode the pairs of the largest and of the smallest margins."""
    margins = pairs.margins.tolist()
    known = [i for i, margin in enumerate(margins) if math.isfinite(margin)]
    order = sorted(known, key=lambda i: (-margins[i], i))
    right = [i for i in order if margins[i] > 0][:SHOWN]
    wrong = [i for i in reversed(order) if margins[i] <= 0][:SHOWN]
    decode = lambda ids: _shortened(dataset.tokenizer.decode(plain_ids(ids).tolist()))
    rows = []
    for i in right + wrong:
        # Of a sample of the test set: its place in the whole one.
        place, margin = int(pairs.indices[i]), margins[i]
        texts = zip(("prompt", "chosen", "rejected"), map(decode, dataset[place][:3]))
        row = {"pair": place, **dict(texts), "margin": margin, "right": margin > 0}
        rows.append(row)
    return rows


def _shortened(text):
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]} […] {text[-half:]}"


def save_pairs(
    folder: str | Path, pairs: list[dict], before: Iterable, after: Iterable
) -> None:
    """Keep what a report shows of single pairs, in ``test_pairs.json``."""
    rounded = [[round(float(x), 4) for x in margins] for margins in (before, after)]
    content = {"before": rounded[0], "after": rounded[1], "pairs": pairs}
    write_json(Path(folder) / FILE_NAME, content)
