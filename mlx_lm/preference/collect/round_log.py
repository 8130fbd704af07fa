# Copyright © 2026 MLX Contributors

"""What a round was like: scores, lengths, ends, failures, the distance from the start."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..terminal import counted
from .answers import Answers, Key
from .labels import NONE, SCORES, TIE, Label

Labels = Mapping[Key, Mapping[str, Label]]
# Files of a folder of rounds: where it is, and a line for each round.
STATE, LOG = "rounds.json", "rounds.jsonl"
# From where on a warning is given.
MUCH_LONGER, MANY_FAILURES, MOST_EQUAL = 4 / 3, 0.05, 0.5


def answer_facts(answers: Sequence[Answers], prefix: str = "") -> dict[str, float]:
    """How long answers are in tokens, how many the model ended, how many are equal."""
    found = [one for line in answers for one in line.responses]
    sampled = sum(max(line.sampled, len(line.responses)) for line in answers)
    return {
        f"{prefix}tokens": mean_of([len(one.tokens) for one in found]),
        f"{prefix}eos_share": mean_of([one.finished for one in found]),
        f"{prefix}equal_share": 1 - len(found) / max(sampled, 1),
    }


def describe_round(answers: Sequence[Answers], labels: Labels) -> dict[str, Any]:
    """The facts of a round's answers and of what judges said of them."""
    said = [x for line in answers for x in labels.get(line.key, {}).values()]
    scores = [x.known_scores() for x in said if x.verdict in (SCORES, TIE) and x.scores]
    orders = [order for x in said for order in x.orders or ()]
    count = max(len(said), 1)
    return {
        "prompts": len(answers),
        "score": mean_of([np.mean(x) for x in scores]),
        "score_gap": mean_of([max(x) - min(x) for x in scores]),
        "tie_share": sum(x.verdict == TIE for x in said) / count,
        "failed_share": sum(x.verdict == NONE for x in said) / count,
        "all_equal_share": mean_of([len(line.responses) == 1 for line in answers]),
        "order_agreement": mean_of([(x[2] > 0.5) != (x[3] > 0.5) for x in orders]),
        **answer_facts(answers),
    }


def length_facts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many pairs there are, and how long their answers are in tokens."""
    sides = {
        f"{side}_tokens": mean_of(
            [len(row[f"{side}_tokens"]) for row in rows if f"{side}_tokens" in row]
        )
        for side in ("chosen", "rejected")
    }
    return {"pairs": len(rows), **sides}


def compare_with_start(answers: Sequence[Answers], labels: Labels) -> dict[str, Any]:
    """Scores and wins of second responses, the policy's, over first ones, the start's."""
    wins, before, after = [], [], []
    for line in answers:
        if len(line.responses) == 1:
            wins.append(0.5)
        for label in labels.get(line.key, {}).values():
            places = label.places(2)
            if places is None or len(line.responses) < 2:
                continue
            wins.append(
                0.5 + 0.5 * (places[1] < places[0]) - 0.5 * (places[1] > places[0])
            )
            scores = label.known_scores()
            if label.verdict in (SCORES, TIE) and len(scores) == 2:
                before.append(scores[0])
                after.append(scores[1])
    found = {"held_out/win_rate": mean_of(wins), "held_out/compared": len(wins)}
    for name, values in (("start_score", before), ("score", after)):
        found[f"held_out/{name}"] = mean_of(values)
        found[f"held_out/{name}_error"] = standard_error(values)
    return found


def mean_of(values: Sequence[Any]) -> float:
    """The mean, NaN of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")


def standard_error(values: Sequence[float]) -> float:
    """The standard error of a mean, NaN of fewer than two values."""
    if len(values) < 2:
        return float("nan")
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def describe_line(line: Mapping[str, Any]) -> list[str]:
    """A round's line of the log in words."""
    has = lambda name: is_known(line.get(name))
    text = (
        f"Round {line['round']}: {counted(line['pairs'], 'pair')} of "
        f"{counted(line['prompts'], 'prompt')}"
    )
    if has("score"):
        text += f", mean score {line['score']:.3g}"
        text += f" (best over worst {line['score_gap']:.3g})"
    lines = [
        f"{text}; ties {line['tie_share']:.0%}, without a verdict "
        f"{line['failed_share']:.0%}."
    ]
    ends = f"{counted(round(line['tokens']), 'token')}"
    ends += f", {line['eos_share']:.0%} ended by the model"
    if has("chosen_tokens"):
        chosen, rejected = line["chosen_tokens"], line["rejected_tokens"]
        ends += f"; chosen ones {chosen:.0f}, rejected ones {rejected:.0f}"
    if has("order_agreement"):
        ends += f"; both orders agree in {line['order_agreement']:.0%}"
    lines.append(f"  answers: {ends}.")
    if has("held_out/win_rate"):
        text = f"  held out: wins against the start {line['held_out/win_rate']:.1%}"
        if has("held_out/score"):
            error = 1.96 * line["held_out/score_error"]
            text += f", mean score {line['held_out/score']:.3f} ± {error:.3f}"
            text += f" (start {line['held_out/start_score']:.3f})"
        text += f", KL {line['held_out/kl']:.2f}"
        if has("held_out/kl_error"):
            text += f" ± {1.96 * line['held_out/kl_error']:.2f}"
        text += " nats an answer"
        tokens = counted(round(line["held_out/tokens"]), "token")
        lines.append(f"{text}, {tokens}.")
    return lines


# The columns of all rounds side by side: width, form, and names of which the first counts
# that is there, what was held out before what was trained on.
_COLUMNS = {
    "round": (7, "{:,.0f}", ("round",)),
    "pairs": (7, "{:,.0f}", ("pairs",)),
    "score": (8, "{:.3g}", ("held_out/score", "score")),
    "wins": (8, "{:.1%}", ("held_out/win_rate",)),
    "KL": (8, "{:.2f}", ("held_out/kl",)),
    "tokens": (8, "{:,.0f}", ("held_out/tokens", "tokens")),
    "ended": (8, "{:.0%}", ("held_out/eos_share", "eos_share")),
}


def side_by_side(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """All rounds below each other, without the columns that none of them has."""
    table = []
    for title, (width, form, names) in _COLUMNS.items():
        cells = []
        for line in lines:
            known = [line[name] for name in names if is_known(line.get(name))]
            cells.append(form.format(known[0]) if known else "")
        if any(cells):
            table.append([cell.rjust(width) for cell in (title, *cells)])
    return ["".join(row).rstrip() for row in zip(*table)]


def is_known(value: Any) -> bool:
    """Whether there was something to measure."""
    return isinstance(value, (int, float)) and value == value


def warnings_of(line: Mapping[str, Any]) -> list[str]:
    """What of a round is to be looked at before the next one."""
    found = []
    chosen, rejected = line["chosen_tokens"], line["rejected_tokens"]
    if chosen > MUCH_LONGER * rejected:
        found.append(
            f"the chosen answers are longer than the rejected ones by "
            f"{chosen / rejected - 1:.0%}: the policy may learn length."
        )
    if line["failed_share"] > MANY_FAILURES:
        found.append(
            f"the judge gave no verdict for {line['failed_share']:.0%} of the prompts."
        )
    if line["all_equal_share"] > MOST_EQUAL:
        found.append(
            f"all answers are equal for {line['all_equal_share']:.0%} of the prompts: "
            "raise temperature."
        )
    return found
