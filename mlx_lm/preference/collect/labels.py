# Copyright © 2026 MLX Contributors

"""What judges said of answers, a line each in ``labels.jsonl``, and how they agree."""

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from ..files import open_plain
from ..run.reading import read_lines
from ..terminal import counted, rprint
from .answers import Answers, Key, append_line

LABELS = "labels.jsonl"
SCORES, RANKING, TIE, BAD, NONE = "scores", "ranking", "tie", "bad", "none"
WITHDRAWN = "withdrawn"
VERDICTS = (SCORES, RANKING, TIE, BAD, NONE)
HUMAN, REWARD = "human:", "reward"
_NEEDED = ("id", "judge", "verdict")


@dataclass(frozen=True)
class Label:
    """One judge's word on the responses to one prompt."""

    id: str
    judge: str
    verdict: str
    round: int = 0
    # None for an answer that was not compared.
    scores: list[float | None] | None = None
    ranking: list[list[int]] | None = None
    certainty: float | None = None
    # Of each two that were compared: their numbers, and how likely the one shown
    # first is better, with the first of them there and with the second.
    orders: list[list[float]] | None = None
    edited: dict[str, Any] | None = None
    shown: list[int] | None = None
    seconds: float | None = None
    why: str | None = None
    # The mark of the answers that were judged; none in older folders.
    of: str | None = None

    @property
    def key(self) -> Key:
        """What names the prompt, as its answers have it."""
        return self.round, self.id

    @property
    def is_human(self) -> bool:
        return self.judge.startswith(HUMAN)

    def known_scores(self) -> list[float]:
        """The scores of those answers that were compared."""
        return [score for score in self.scores or () if score is not None]

    def places(self, size: int) -> list[float] | None:
        """Places from 0 for the best, equal ones share their mean, NaN is not compared."""
        if self.verdict in (TIE, BAD):
            return [(size - 1) / 2] * size
        if self.verdict == RANKING:
            groups = self.ranking or []
        elif self.verdict == SCORES:
            scores = self.scores or []
            best_first = sorted({*self.known_scores()}, reverse=True)
            groups = [[i for i, s in enumerate(scores) if s == b] for b in best_first]
        else:
            return None
        found, before = [math.nan] * size, 0
        for group in groups:
            for response in group:
                found[response] = before + (len(group) - 1) / 2
            before += len(group)
        return found


def append_label(folder: str | Path, label: Label) -> None:
    """Add a label, and wait until it is on the disk."""
    append_line(Path(folder) / LABELS, asdict(label))


def read_labels(
    folder: str | Path, answers: Sequence[Answers] | None = None
) -> dict[Key, dict[str, Label]]:
    """The last word of each judge on each prompt, if it is about those answers."""
    path = Path(folder) / LABELS
    by_key = None if answers is None else {one.key: one for one in answers}
    found: dict[Key, dict[str, Label]] = {}
    strange = 0
    for row in read_lines(path, **dict.fromkeys(_NEEDED, (str,))):
        if (label := _as_label(row, by_key)) is None:
            strange += 1
        elif label.verdict == WITHDRAWN:
            found.get(label.key, {}).pop(label.judge, None)
        else:
            found.setdefault(label.key, {})[label.judge] = label
    if strange:
        rprint(
            f"[WARNING] {path}: left out {counted(strange, 'label')}, of other answers "
            "than this folder's."
        )
    return {key: labels for key, labels in found.items() if labels}


def new_labels(path: str | Path, start: int) -> tuple[list[Label], int]:
    """The labels, and withdrawals, behind so many bytes, and where they end."""
    with open(path, "rb", opener=open_plain) as file:
        file.seek(start)
        # What has no end yet is being written.
        whole, end, _ = file.read().rpartition(b"\n")
    found = []
    for line in whole.split(b"\n"):
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            named = isinstance(row, dict) and (row.get(k) for k in _NEEDED)
            if named and all(isinstance(value, str) for value in named):
                found.append(_as_label(row, None))
    return [label for label in found if label], start + len(whole + end)


def _as_label(row: dict, answers: Mapping[Key, Answers] | None) -> Label | None:
    names = Label.__dataclass_fields__
    label = Label(**{k: v for k, v in row.items() if k in names})
    if type(label.round) is not int:
        return None
    if answers is None:
        return label if fits(label, None) else None
    given = answers.get(label.key)
    return label if given and is_about(label, given) else None


def is_about(label: Label, answers: Answers) -> bool:
    """Whether a label is of these answers, not of others to the same prompt."""
    return label.of in (None, answers.mark) and fits(label, len(answers.responses))


def fits(label: Label, size: int | None) -> bool:
    """Whether a label says something of so many responses, or of any number."""
    if not _is_verdict(label, size):
        return False
    if label.certainty is not None and not (
        _is_number(label.certainty) and 0.5 <= label.certainty <= 1
    ):
        return False
    if label.orders is not None and not (
        isinstance(label.orders, list) and all(map(_is_order, label.orders))
    ):
        return False
    edited = label.edited
    if edited is None:
        return True
    return (
        isinstance(edited, dict)
        and isinstance(edited.get("text"), str)
        and _are_places([edited.get("response")], size)
    )


def _is_verdict(label, size):
    if label.verdict == SCORES:
        scores = label.scores
        if not isinstance(scores, list) or size not in (None, len(scores)):
            return False
        known = [score for score in scores if score is not None]
        return len(known) >= min(2, len(scores)) and all(map(_is_number, known))
    if label.verdict == RANKING:
        groups = label.ranking
        if not isinstance(groups, list) or not all(
            isinstance(group, list) and group for group in groups
        ):
            return False
        named = [response for group in groups for response in group]
        return bool(named) and _are_places(named, size) and len({*named}) == len(named)
    return label.verdict in (*VERDICTS, WITHDRAWN)


def _is_order(order):
    return isinstance(order, list) and len(order) == 4 and all(map(_is_number, order))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and is_finite(value)


def is_finite(value: float) -> bool:
    """Whether a number is one, and no larger than any float, as whole ones may be."""
    return abs(value) <= sys.float_info.max


def _are_places(values: Sequence[Any], size: int | None) -> bool:
    most = math.inf if size is None else size
    return all(type(value) is int and 0 <= value < most for value in values)


def certainty(scores: Sequence[float | None]) -> float:
    """Bradley and Terry's probability that the best is better than the worst."""
    known = [score for score in scores if score is not None]
    return round(1 / (1 + math.exp(min(known) - max(known))), 6)


def orders(label: Label, size: int) -> dict[tuple[int, int], int]:
    """How a judge ordered each two responses: 1 for the first, -1, 0 for a tie."""
    places = label.places(size) or []
    return {
        (i, j): (b > a) - (b < a)
        for (i, a), (j, b) in combinations(enumerate(places), 2)
        if not math.isnan(a) and not math.isnan(b)
    }


@dataclass(frozen=True)
class Agreement:
    """How often two judges order two responses alike, and how far from chance."""

    first: str
    second: str
    pairs: int
    share: float
    #: None where chance alone agrees always.
    kappa: float | None


def agreements(
    labels: Mapping[Key, Mapping[str, Label]], sizes: Mapping[Key, int]
) -> Iterator[Agreement]:
    """Compare each two judges on the prompts that both labelled."""
    judges = sorted({judge for by_judge in labels.values() for judge in by_judge})
    for first, second in combinations(judges, 2):
        counts: Counter[tuple[int, int]] = Counter()
        for key, by_judge in labels.items():
            if first not in by_judge or second not in by_judge:
                continue
            ours, theirs = (orders(by_judge[j], sizes[key]) for j in (first, second))
            counts.update((ours[p], theirs[p]) for p in ours.keys() & theirs.keys())
        if counts:
            yield Agreement(first, second, counts.total(), *share_and_kappa(counts))


def share_and_kappa(counts: Counter) -> tuple[float, float | None]:
    """The share said alike, and Cohen's kappa: how much of it is beyond chance."""
    # Chance says "the first", "the second" and "tie" as often as each judge does:
    # https://doi.org/10.1177/001316446002000104
    total = counts.total()
    share = sum(n for (a, b), n in counts.items() if a == b) / total
    chance = 0.0
    for value in (-1, 0, 1):
        ours = sum(n for (a, _), n in counts.items() if a == value)
        theirs = sum(n for (_, b), n in counts.items() if b == value)
        chance += ours * theirs / total**2
    return share, None if chance == 1 else (share - chance) / (1 - chance)
