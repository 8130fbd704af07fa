# Copyright © 2026 MLX Contributors

"""What a judge returns, and what of it becomes a label."""

from dataclasses import dataclass
from typing import Any

from ..terminal import counted
from .labels import BAD, NONE, RANKING, SCORES, TIE, Label, fits, is_finite


@dataclass(frozen=True)
class Verdict:
    """What a judge said of some responses."""

    verdict: str
    scores: list[float | None] | None = None
    ranking: list[list[int]] | None = None
    certainty: float | None = None
    orders: list[list[float]] | None = None
    why: str | None = None


def as_verdict(said: Any, size: int) -> Verdict:
    """Take what a judge returned for what it is, or for nothing."""
    if isinstance(said, Verdict):
        return said
    said = said.tolist() if hasattr(said, "tolist") else said
    if said is None:
        return Verdict(NONE, why="the judge can't tell")
    if isinstance(said, str) and said in (TIE, BAD):
        return Verdict(said)
    values = list(said) if isinstance(said, (list, tuple)) else []
    values = [x.item() if hasattr(x, "item") else x for x in values]
    if values and all(isinstance(x, (int, float)) for x in values):
        if not all(map(is_finite, values)):
            return Verdict(NONE, why="a score is not finite")
        if len(values) != size:
            return Verdict(
                NONE, why=f"{counted(len(values), 'score')} for {size} responses"
            )
        kind = TIE if len({*values}) == 1 else SCORES
        return Verdict(kind, scores=[float(x) for x in values])
    if values and all(isinstance(x, (list, tuple)) for x in values):
        found = Verdict(RANKING, ranking=[list(group) for group in values])
        if fits(Label("", "", RANKING, ranking=found.ranking), size):
            return found if len(values) > 1 else Verdict(TIE)
    return Verdict(NONE, why=f"no verdict on {size} responses: {said!r:.60}")
