# Copyright © 2026 MLX Contributors

"""Responses compared two by two, each two in both orders.

What a judge prefers only while it is shown first, or second, is a tie.
"""

import json
from collections.abc import Callable
from itertools import combinations
from typing import Any

from .labels import NONE, SCORES, TIE
from .verdicts import Verdict

# How likely the response shown first is the better one; or why nobody knows.
Prefer = Callable[[str], float | str]

QUESTION = """\
You are shown a conversation and two replies to it, A and B. Decide which reply \
serves the person better: it does what was asked, is correct and clear, and is no \
longer than it needs to be. The order of the replies means nothing.

=== Conversation ===
{prompt}

=== Reply A ===
{first}

=== Reply B ===
{second}

=== End ===
"""


def compare(prompt: Any, responses: list[str], prefer: Prefer) -> Verdict:
    """Score each response by its mean probability of being better than another."""
    size = len(responses)
    wins = [[0.5] * size for _ in range(size)]
    orders = []
    for i, j in combinations(range(size), 2):
        both: list[float] = []
        for first, second in ((i, j), (j, i)):
            said = prefer(question(prompt, responses[first], responses[second]))
            if isinstance(said, str):
                return Verdict(NONE, why=said)
            both.append(said)
        forward, backward = both
        orders.append([i, j, round(forward, 6), round(backward, 6)])
        if (forward - 0.5) * (0.5 - backward) > 0:
            wins[i][j] = (forward + 1 - backward) / 2
            wins[j][i] = 1 - wins[i][j]
    scores = [(sum(row) - 0.5) / (size - 1) for row in wins]
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if scores[best] == scores[worst]:
        return Verdict(TIE, orders=orders)
    return Verdict(
        SCORES,
        scores=[round(score, 6) for score in scores],
        certainty=max(0.5, round(wins[best][worst], 6)),
        orders=orders,
    )


def question(prompt: Any, first: str, second: str) -> str:
    """Ask which of two responses is better."""
    return QUESTION.format(prompt=spoken(prompt), first=first, second=second)


def spoken(prompt: Any) -> str:
    """A prompt as a text that a judge can read."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {_said(turn)}" for turn in prompt)


def _said(turn):
    """What a turn says, and what it does, such as calls of tools."""
    acts = {k: x for k, x in turn.items() if k not in ("role", "content") and x}
    parts = turn.get("content"), json.dumps(acts) if acts else None
    return "\n".join(part for part in parts if part)
