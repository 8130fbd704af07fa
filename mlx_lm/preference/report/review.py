# Copyright © 2026 MLX Contributors

"""Labels that may be wrong: the policy is sure of the other answer, or judges differ."""

import shlex
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..data.collected import is_collected
from ..data.sources import open_local_splits
from ..errors import InputError
from ..files import json_text, write_text, writing
from ..measure.pair_metrics import preference_probabilities
from ..measure.pair_scores import ScoredPairs
from ..terminal import counted, rprint

FILE_NAME = "review.jsonl"
# P(chosen) below which the policy is sure that the rejected answer is better.
SURE = 0.1
# Lines on the screen.
SHOWN = 5


def second_looks(
    dataset: Any, scored: ScoredPairs, folder: str | Path
) -> list[dict[str, Any]]:
    """The pairs of a collected folder whose labels deserve a second look, worst first."""
    if not is_collected(folder):
        return []
    found = preference_probabilities(scored.margins)
    by_place: dict[str | int, float] = {}
    for index, probability in zip(scored.indices.tolist(), found.tolist()):
        place = dataset.source_row(index)
        by_place[place] = min(by_place.get(place, 1.0), probability)
    looks = []
    for split in open_local_splits(folder).values():
        rows = split()
        for i in range(len(rows)):
            probability = by_place.pop(rows.location(i), None)
            if probability is None or type(rows[i].get("id")) is not str:
                continue
            agreement = rows[i].get("agreement")
            agreement = agreement if type(agreement) is float else 1.0
            why = []
            if probability < SURE:
                why.append(f"the policy gives the label {probability:.1%}")
            if agreement < 1:
                why.append(f"{agreement:.0%} of the judges agree with the label")
            if why:
                name = {"id": rows[i]["id"], "round": rows[i].get("round", 0)}
                looks.append((probability, {**name, "why": "; ".join(why)}))
    looks.sort(key=lambda look: look[0])
    # A prompt may have several pairs: the worst stands for all.
    worst = {(look["id"], look["round"]): look for _, look in reversed(looks)}
    return [look for _, look in looks if worst[look["id"], look["round"]] is look]


def keep_looks(
    folder: str | Path, dataset: Any, scored: ScoredPairs, data: str | Path
) -> None:
    """List such pairs of a run in its folder, and say how to see them again."""
    if mx.distributed.init().rank() != 0:
        return
    path = Path(folder) / FILE_NAME
    try:
        looks = second_looks(dataset, scored, data)
        if not looks:
            with writing(path):
                path.unlink(missing_ok=True)
            return
        write_text(path, "".join(json_text(look) + "\n" for look in looks))
    except InputError as e:
        # Somebody else's adapter can be tested, too.
        rprint(f"[WARNING] {e}")
        return
    rprint(f"{counted(len(looks), 'label')} may be wrong:")
    for look in looks[:SHOWN]:
        rprint(f"  {look['id']}: {look['why']}")
    more = f"  … and {len(looks) - SHOWN:,} more in {path}. " if looks[SHOWN:] else ""
    rprint(f"{more}To judge them again:")
    rprint(f"  {again_command(data, folder)}")


def again_command(data: str | Path, folder: str | Path) -> str:
    """The command that shows the labels again that a run's folder lists."""
    output, review = (shlex.quote(str(x)) for x in (data, folder))
    return f"mlx_lm.dpo_collect --label human --output {output} --review {review}"
