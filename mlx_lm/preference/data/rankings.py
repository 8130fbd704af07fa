# Copyright © 2026 MLX Contributors

"""
Rows that hold more or less than one pair.

A row becomes several pairs, or none of it is used:

- A ranking of K answers is K (K - 1) / 2 pairs of weight 2 / (K (K - 1)) each.
  For losses of whole rankings it is pairs of neighbours: the best and the second,
  the third and the fourth. The last of an odd number has a copy of the best.
- Each criterion that has a weight is one pair of that weight: the best against the
  worst answer. Ties and missing scores are left out.
- For losses of single answers every row is answers with a label, 1 or 0; a pair is
  two of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from .columns import find_question
from .content import RowFault, is_number
from .messages import as_messages
from .pairs import TIE, PreferenceRow, are_tokens, make_pair
from .prompts import Prompt, find_prompt
from .row import ANSWERS, PREFERENCE, TOKENS, Reading, Row


def need_prompt(row: Row) -> Prompt:
    """The prompt of a row whose answers don't hold it."""
    prompt = find_prompt(row)
    if prompt.value is None:
        raise row.needs("prompt")
    return prompt


def ranked_pairs(
    row: Row,
    answers: Sequence[Any],
    grades: Sequence[float],
    reading: Reading,
    shape: str,
    tokens: Sequence[Any] = (),
) -> list[PreferenceRow]:
    """The pairs of answers with grades, high ones for good answers."""
    if reading.kind == "labels":
        raise RowFault("a ranking has no labels")
    prompt = need_prompt(row)
    if reading.kind == "pairs":
        row.choices.append(f"ranking_pairs {reading.ranking_pairs}")
    ids = tokens or [None] * len(answers)
    pair = lambda i, j, **values: make_pair(
        row,
        answers[i],
        answers[j],
        reading,
        shape,
        prompt,
        tokens=(ids[i], ids[j]),
        **values,
    )
    order = sorted(range(len(answers)), key=lambda i: -grades[i])
    if reading.kind == "rankings":
        # Of answers with one grade the first stands for all.
        order = [
            i for n, i in enumerate(order) if not n or grades[i] != grades[order[n - 1]]
        ]
    better = [(i, j) for i, j in combinations(order, 2) if grades[i] != grades[j]]
    if not better:
        raise RowFault(TIE)
    if reading.kind == "rankings":
        return _whole_ranking(pair, order)
    if reading.ranking_pairs == "neighbours":
        places = sorted({grades[i] for i in order}, reverse=True)
        following = dict(zip(places, places[1:]))
        better = [(i, j) for i, j in better if following[grades[i]] == grades[j]]
    elif reading.ranking_pairs == "best_and_worst":
        better = [(order[0], order[-1])]
    return [pair(i, j, weights=1 / len(better)) for i, j in better]


def _whole_ranking(pair: Any, order: list[int]) -> list[PreferenceRow]:
    count = len(order)
    found = [
        pair(*order[i : i + 2], places=(float(i), i + 1.0))
        for i in range(0, count - 1, 2)
    ]
    if count % 2:
        places = (-1.0, float(count - 1))
        found.append(pair(order[0], order[-1], places=places))
    return found


def read_ranking(row: Row, reading: Reading) -> list[PreferenceRow]:
    """Answers in a list, the best first."""
    answers = row.take("ranking", ANSWERS)
    if not isinstance(answers, (list, tuple)) or len(answers) < 2:
        raise RowFault("ranking is no list of two or more answers")
    if any(a == b for a, b in combinations(answers, 2)):
        raise RowFault("equal answers", "ranking")
    grades = range(len(answers), 0, -1)
    tokens = row.may("ranking_tokens", TOKENS)
    is_known = isinstance(tokens, list) and len(tokens) == len(answers)
    ids = [x if are_tokens(x) else None for x in tokens] if is_known else []
    return ranked_pairs(row, answers, grades, reading, "ranking", ids)


@dataclass
class Scored:
    """Answers to one prompt, and what each criterion says of them."""

    shape: str
    # Scores of all answers; the place of the better of two; or chosen and rejected.
    criteria: dict[str, Any]
    answers: Sequence[Any] | None = None
    # What counts if the settings name no criteria.
    default: Mapping[str, float] | None = None


def criteria_pairs(row: Row, scored: Scored, reading: Reading) -> list[PreferenceRow]:
    """A pair for every criterion that has a weight."""
    weights = reading.criteria or scored.default
    if not weights:
        raise RowFault("criteria without weights", "set criteria")
    if not reading.criteria:
        row.choices.append(f"criteria {', '.join(weights)}")
    known = {name for name in weights if scored.criteria.get(name) is not None}
    if not known:
        raise RowFault(
            "no known criterion", ", ".join(sorted(map(str, scored.criteria)))
        )
    is_ours = scored.shape == "criteria"
    prompt = need_prompt(row) if is_ours else find_question(row)
    found = [(n, _choice(n, scored)) for n in weights if n in known]
    choices = [(name, choice) for name, choice in found if choice is not None]
    if not choices:
        raise RowFault(TIE)
    pairs = []
    for name, (chosen, rejected) in choices:
        pair = make_pair(row, chosen, rejected, reading, scored.shape, prompt)
        if reading.criteria:
            pair.values["weights"] = float(weights[name])
        pairs.append(pair)
    return pairs


def _choice(name: Any, scored: Scored) -> tuple | None:
    """The better and the worse answer by a criterion, None for a tie."""
    value, answers = scored.criteria[name], scored.answers
    if isinstance(value, Mapping):
        if not {"chosen", "rejected"} <= value.keys():
            raise RowFault("criterion without chosen and rejected", str(name))
        return value["chosen"], value["rejected"]
    if answers is None:
        raise RowFault("missing column", "responses")
    if not isinstance(answers, (list, tuple)):
        raise RowFault("wrong type", f"responses is {type(answers).__name__}")
    if isinstance(value, list):
        return _best_and_worst(answers, value)
    if len(answers) == 2 and value in (0, 1) and is_number(value):
        return answers[int(value)], answers[1 - int(value)]
    raise RowFault("criterion is no scores and no 0 or 1", str(name))


def _best_and_worst(answers: Any, scores: list) -> tuple | None:
    if len(scores) != len(answers):
        raise RowFault("not one score for each response")
    if not all(s is None or is_number(s) for s in scores):
        raise RowFault("score is not a number")
    known = [i for i, score in enumerate(scores) if score is not None]
    if not known:
        return None
    best = max(known, key=lambda i: scores[i])
    worst = min(known, key=lambda i: scores[i])
    if scores[best] == scores[worst]:
        return None
    return answers[best], answers[worst]


def read_label(row: Row, reading: Reading) -> list[PreferenceRow]:
    """One answer, and whether it is desired."""
    name = "kto_tag" if "kto_tag" in row else "label"
    if reading.kind != "labels":
        raise RowFault("labels need loss_type kto or apo_zero_unpaired")
    label = row.take(name, PREFERENCE)
    if not isinstance(label, (bool, int, float)) or label not in (0, 1):
        raise RowFault("label is not 0 or 1")
    answer = next((n for n in ("completion", "output", "response") if n in row), None)
    prompt = None
    if answer is None:
        column = "messages" if "messages" in row else "conversations"
        completion = as_messages(row.take(column, ANSWERS), column)
        prompt = Prompt()
    else:
        completion = row.take(answer, ANSWERS)
    if isinstance(completion, str):
        prompt = need_prompt(row)
        other: Any = "-" if completion.strip() != "-" else "+"
        if isinstance(prompt.value, str) and completion.startswith(prompt.value):
            other = prompt.value + other
    else:
        completion = as_messages(completion, "completion")
        # All turns but the last may repeat the prompt.
        text = "-" if completion[-1].get("content") != "-" else "+"
        other = [*completion[:-1], {"role": "assistant", "content": text}]
    pair = make_pair(row, completion, other, reading, "labelled", prompt)
    pair.rejected, pair.values = None, {"labels": float(label)}
    return [pair]


def singles(pair: PreferenceRow) -> list[PreferenceRow]:
    """A pair as two answers with labels."""
    if pair.rejected is None:
        return [pair]
    if pair.values:
        raise RowFault("criteria have no labels")
    return [
        replace(
            pair,
            chosen=answer,
            rejected=None,
            chosen_tokens=tokens,
            rejected_tokens=None,
            values={"labels": label},
        )
        for answer, tokens, label in (
            (pair.chosen, pair.chosen_tokens, 1.0),
            (pair.rejected, pair.rejected_tokens, 0.0),
        )
    ]
