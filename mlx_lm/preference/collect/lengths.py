# Copyright © 2026 MLX Contributors

"""Rewards without what an answer gets for its length alone.

A reward is a sum over tokens, so that it grows, or falls, with their number. As in DICE
(https://arxiv.org/abs/2406.09760, section 4.1) a token costs as much as makes the answers
that win as long as those that lose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from .answers import Answers, Key
from .labels import NONE, REWARD, SCORES, Label, certainty

Labels = Mapping[Key, Mapping[str, Label]]


def without_length(
    answers: Sequence[Answers], labels: Labels, penalty: float | None = None
) -> tuple[Labels, float | None]:
    """Labels whose rewards are less the penalty for each token, and the penalty."""
    found = {}
    for one in answers:
        said = {k: x for k, x in labels.get(one.key, {}).items() if x.verdict != NONE}
        # Where others have judged, it makes no pair.
        if said.keys() == {REWARD} and said[REWARD].verdict == SCORES:
            lengths = [len(response.tokens) for response in one.responses]
            scores = [np.nan if s is None else s for s in said[REWARD].scores or ()]
            found[one.key] = np.array(scores, float), np.array(lengths, float)
    if not found:
        return labels, None
    if penalty is None:
        penalty = even_penalty([*found.values()])
    changed = dict(labels)
    for key, (rewards, lengths) in found.items():
        left = rewards - penalty * lengths
        scores = [None if np.isnan(x) else round(x, 6) for x in left.tolist()]
        label = replace(labels[key][REWARD], scores=scores, certainty=certainty(scores))
        changed[key] = {**labels[key], REWARD: label}
    return changed, penalty


def even_penalty(prompts: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """What a token must cost for the best answers to be as long as the worst ones."""
    size = max(len(rewards) for rewards, _ in prompts)
    pad = lambda x: np.pad(x, (0, size - len(x)), constant_values=np.nan)
    rewards, lengths = (np.array([pad(x) for x in part]) for part in zip(*prompts))
    rows = np.arange(len(prompts))

    def gap(penalty):
        left = rewards - penalty * lengths
        best, worst = np.nanargmax(left, axis=1), np.nanargmin(left, axis=1)
        return (lengths[rows, best] - lengths[rows, worst]).mean()

    # The order of two answers changes where a line through both has this slope.
    i, j = np.triu_indices(size, 1)
    longer = lengths[:, i] - lengths[:, j]
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = (rewards[:, i] - rewards[:, j]) / longer
    slopes = np.unique(slopes[(longer != 0) & np.isfinite(slopes)])
    between = (slopes[:-1] + slopes[1:]) / 2
    # The more a token costs, the shorter is what wins.
    low, high = 0, len(between)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if gap(between[middle]) > 0 else (low, middle)
    tried = [0.0, *sorted(between[max(low - 1, 0) : low + 1].tolist(), key=abs)]
    return min(tried, key=lambda penalty: abs(gap(penalty)))
