# Copyright © 2026 MLX Contributors

"""Single pairs on a terminal: the text that a model sees and what it says of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.text import Text

from .calibration import preference_probabilities
from .pair_scores import CHOSEN, REJECTED, ScoredPairs

PROMPT_LINES = 6
ANSWER_LINES = 10
CUT_LINES = 2


@dataclass(frozen=True)
class PairTexts:
    """
    A pair as decoded tokens, special ones included.

    Args:
        place (str): The row that it comes from.
        prompt (str): All of the prompt.
        answers (tuple): The scored part of the chosen and of the rejected answer.
        cut (tuple): For both what ``max_seq_length`` cut off, empty for nothing.
        cut_tokens (tuple): How many tokens that was.
        prompt_tokens (int): Tokens of the prompt.

    Example:
        >>> PairTexts("row 3", "Hi", ("a", "b"), ("", ""), (0, 0), 1).place
        'row 3'
    """

    place: str
    prompt: str
    answers: tuple[str, str]
    cut: tuple[str, str]
    cut_tokens: tuple[int, int]
    prompt_tokens: int


def inspection_order(margins: np.ndarray, count: int) -> list[int]:
    """
    Which pairs to look at: the surest mistakes first, then the least sure rest.

    That is the order of the margins: a mistake is the surer the lower its margin,
    and a right pair the less sure.

    Args:
        margins (np.ndarray): Reward margins in nats. Shape: ``(n,)``.
        count (int): The most pairs.

    Returns:
        list: Their places; a margin that is no number comes first.

    Example:
        >>> inspection_order(np.array([0.5, -2.0, 0.1, -0.3]), 3)
        [1, 3, 2]
    """
    margins = np.where(np.isnan(margins), -math.inf, margins)
    return np.argsort(margins, kind="stable")[:count].tolist()


def _visible(text):
    """Escape what a terminal would obey or hide; show where lines end."""
    text = text.replace("\r\n", "\n")
    shown = (c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return "".join(shown).replace("\n", "↵\n")


def _wrapped(text, width, most, from_end=False):
    """Indented lines, of which the middle, or the start, may be left out."""
    console = Console(width=width, color_system=None)
    room = width - 4
    lines = [
        line.plain.rstrip()
        for paragraph in _visible(text).split("\n")
        for line in (Text(paragraph).wrap(console, room) or [Text("")])
    ]
    while lines and not lines[-1]:
        lines.pop()
    if len(lines) > most:
        left_out = len(lines) - most + 1
        note = f"[… {left_out} lines …]"
        head = 0 if from_end else (2 * most) // 3
        tail = most - 1 - head
        lines = lines[:head] + [note] + lines[len(lines) - tail :]
    return [f"    {line}".rstrip() for line in lines]


def _numbers(pairs, i):
    lines = ["              policy   reference     reward   tokens  per token"]
    for column, name in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
        policy, reference = (
            pairs.policy_logps[i, column],
            pairs.reference_logps[i, column],
        )
        tokens = pairs.tokens[i, column]
        lines.append(
            f"  {name:<8}{policy:>10.2f}{reference:>12.2f}"
            f"{pairs.rewards[i, column]:>+11.3f}{tokens:>9,}"
            f"{policy / max(tokens, 1):>11.3f}"
        )
    return lines


def inspection_lines(
    pairs: ScoredPairs, texts: Sequence[PairTexts], width: int = 80
) -> list[str]:
    """
    Show pairs: what is scored, the log-probs in nats, the rewards, right or wrong.

    Args:
        pairs (ScoredPairs): The pairs, in the order in which to show them.
        texts (Sequence): Their texts. Control characters are escaped, so that no
            row can write to the terminal but its text.
        width (int): Columns of the terminal. Default: ``80``.

    Returns:
        list: Lines without colours, none wider than ``width``.

    Example:
        >>> one = np.array([[-1.0, -3.0]])
        >>> pairs = ScoredPairs(np.arange(1), one, np.zeros((1, 2)), one, 0.1 * one,
        ...     np.array([[1, 2]]))
        >>> text = PairTexts("row 3", "Hi", ("yes", "no"), ("", ""), (0, 0), 1)
        >>> for line in inspection_lines(pairs, [text])[:3]:
        ...     print(line)
        1 of 1 · right · margin +0.200 · P(chosen) 55.0% · row 3
                      policy   reference     reward   tokens  per token
          chosen       -1.00        0.00     -0.100        1     -1.000
    """
    lines: list[str] = []
    probabilities = preference_probabilities(pairs.margins)
    for i, text in enumerate(texts):
        margin = pairs.margins[i]
        verdict = "right" if margin > 0 else "WRONG"
        head = (
            f"{i + 1} of {len(texts)} · {verdict} · margin {margin:+.3f} · "
            f"P(chosen) {probabilities[i]:.1%} · "
        )
        room = width - len(head)
        place = _visible(text.place)
        place = place if len(place) <= room else f"…{place[len(place) - room + 1 :]}"
        lines += [head + place, *_numbers(pairs, i)]
        lines.append(f"  prompt, {text.prompt_tokens:,} tokens, not scored")
        lines += _wrapped(text.prompt, width, PROMPT_LINES, from_end=True)
        for column, name in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
            lines.append(f"  {name}, scored")
            lines += _wrapped(text.answers[column], width, ANSWER_LINES)
            if text.cut_tokens[column]:
                lines.append(f"  cut off: {text.cut_tokens[column]:,} tokens")
                lines += _wrapped(text.cut[column], width, CUT_LINES)
        lines.append("")
    return lines
