# Copyright © 2026 MLX Contributors

"""
Rows that hold more or less than one pair, and numbers that belong to pairs.

These shapes come beside those of :mod:`.pairs`. A prompt here has any of
their forms: text or messages, ``question`` with ``system``, ``conversations``.

| columns | shape |
|---|---|
| prompt, ranking: list of answers, the best first | ranking |
| prompt, criteria: name to chosen and rejected | criteria |
| prompt, responses, criteria: name to their scores, or the better one's place | criteria |
| instruction, completions with response and annotations | UltraFeedback |
| prompt, completion, label | labelled |

A row becomes several pairs, or none of it is used:

- A ranking of K answers is K (K - 1) / 2 pairs of weight 2 / (K (K - 1)) each.
  For losses of whole rankings it is pairs of neighbours: the best and the second,
  the third and the fourth. The last of an odd number has a copy of the best.
- Each criterion that has a weight is one pair of that weight: the best against the
  worst answer. Ties and missing scores are left out.
- For losses of single answers every row is answers with a label, 1 or 0; a pair is
  two of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from ..errors import InputError
from .messages import RowFault, as_messages
from .pairs import KNOWN_SHAPES as PAIR_SHAPES
from .pairs import TIE, PreferenceRow, need_value, read_row

KINDS = ("pairs", "rankings", "labels")
KNOWN_SHAPES = (
    *PAIR_SHAPES,
    "prompt + ranking",
    "prompt + criteria",
    "prompt + responses + criteria",
    "instruction + completions",
    "prompt + completion + label",
)
NO_WEIGHT = "weight 0"
_PROMPTS = ("prompt", "question", "conversations", "messages")
_LARGEST = 1e30


def check_criteria(criteria: Any) -> None:
    """Refuse criteria whose weights are no positive numbers."""
    if criteria is None:
        return
    if not criteria or not all(_is_number(w) and w > 0 for w in criteria.values()):
        raise InputError(
            f"criteria needs a weight above 0 for every name, got {criteria!r}."
        )


def criteria_names(row: Any) -> set[str]:
    """Name the criteria by which a raw row compares answers."""
    found = row.get("criteria") if isinstance(row, Mapping) else None
    if isinstance(found, Mapping):
        # In a table every row has all columns.
        return {str(name) for name, value in found.items() if value is not None}
    answers = row.get("completions") if isinstance(row, Mapping) else None
    return {
        str(name)
        for answer in (answers if isinstance(answers, list) else [])
        if isinstance(answer, Mapping) and isinstance(answer.get("annotations"), dict)
        for name, value in answer["annotations"].items()
        if value is not None
    }


def read_rows(
    row: Any,
    *,
    kind: str = "pairs",
    weight_feature: str | None = None,
    margin_feature: str | None = None,
    criteria: Mapping[str, float] | None = None,
    **options: Any,
) -> list[PreferenceRow]:
    """Read one raw row of any known shape as all pairs that it holds."""
    if not isinstance(row, Mapping):
        # Tells what it is instead.
        return [read_row(row)]
    prompt, *answers = (
        options.get(f"{name}_feature", name)
        for name in ("prompt", "chosen", "rejected")
    )

    read = _reader(row, answers, options)
    several = _has(row, "ranking", "criteria", "completions", "completion")
    is_pair = all(name in row for name in answers) or not several
    if criteria and criteria_names(row):
        pairs = _read_criteria(row, criteria, prompt, read, options)
    elif not is_pair and "ranking" in row:
        pairs = _read_ranking(row, kind, prompt, read)
    elif not is_pair and "completion" in row and "label" in row:
        pairs = [_read_label(row, kind, prompt, read)]
    elif not is_pair and criteria_names(row):
        raise RowFault("criteria without weights", "set criteria")
    else:
        pairs = [read_row(row, **options)]
    if kind == "rankings":
        for pair in pairs:
            pair.values.setdefault("places", (0.0, 1.0))
    if kind == "labels":
        pairs = [single for pair in pairs for single in _singles(pair)]
    if weight_feature is not None:
        weight = _read_number(row, weight_feature)
        if weight < 0:
            raise RowFault("weight is negative", weight_feature)
        # So small that it is 0 in float32 is 0.
        if weight < 1e-30:
            raise RowFault(NO_WEIGHT)
        for pair in pairs:
            pair.values["weights"] = weight * pair.values.get("weights", 1.0)
    if margin_feature is not None:
        margin = _read_number(row, margin_feature)
        for pair in pairs:
            pair.values["margins"] = margin
    return pairs


def _reader(row: Mapping, answers: Sequence[str], options: dict) -> Callable:
    def read(chosen: Any, rejected: Any, shape: str, **values: Any) -> PreferenceRow:
        # Answers are given under their own names, whatever other columns are called.
        pair = read_row({**row, **dict(zip(answers, (chosen, rejected)))}, **options)
        pair.shape, pair.values = shape, values
        return pair

    return read


def _has(row: Mapping, *names: str) -> bool:
    return any(name in row for name in names)


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    # False for NaN as well.
    return is_real and abs(value) <= _LARGEST


def _need_prompt(row: Mapping, prompt_feature: str) -> None:
    if not _has(row, prompt_feature, *_PROMPTS):
        raise RowFault("missing column", prompt_feature)


def _read_number(row: Mapping, name: str) -> float:
    value = need_value(row, name)
    if not _is_number(value):
        raise RowFault("not a number", f"{name} is {value!r}")
    return float(value)


def _read_ranking(row: Mapping, kind: str, prompt: str, read: Any) -> list:
    if kind == "labels":
        raise RowFault("a ranking has no labels")
    _need_prompt(row, prompt)
    answers = row["ranking"]
    if not isinstance(answers, (list, tuple)) or len(answers) < 2:
        raise RowFault("ranking is no list of two or more answers")
    count = len(answers)
    pairs = list(combinations(range(count), 2))
    if any(answers[i] == answers[j] for i, j in pairs):
        raise RowFault("equal answers", "ranking")
    if kind == "pairs":
        share = 1 / len(pairs)
        return [
            read(answers[i], answers[j], "ranking", weights=share) for i, j in pairs
        ]
    found = [
        read(*answers[i : i + 2], "ranking", places=(float(i), i + 1.0))
        for i in range(0, count - 1, 2)
    ]
    if count % 2:
        last = (-1.0, float(count - 1))
        found.append(read(answers[0], answers[-1], "ranking", places=last))
    return found


def _read_criteria(
    row: Mapping, criteria: Mapping, prompt: str, read: Any, options: dict
) -> list:
    shape = "criteria"
    if isinstance(row.get("criteria"), Mapping):
        _need_prompt(row, prompt)
        choices = _row_choices(row, criteria)
    else:
        shape = "UltraFeedback"
        choices = _annotated_choices(row, criteria)
        # It has names of its own.
        options = {k: v for k, v in options.items() if not k.endswith("_feature")}
        question = {"question": row.get("instruction")}
        read = _reader(question, ("chosen", "rejected"), options)
    if not choices:
        raise RowFault("no known criterion", ", ".join(sorted(criteria_names(row))))
    pairs = [
        read(*choice, shape, weights=float(criteria[name]))
        for name, choice in choices.items()
        if choice is not None
    ]
    if not pairs:
        raise RowFault(TIE)
    return pairs


def _row_choices(row: Mapping, criteria: Mapping) -> dict[str, tuple | None]:
    """For each criterion the better and the worse answer, None for a tie."""
    found: dict[str, tuple | None] = {}
    responses = row.get("responses")
    for name in criteria:
        value = row["criteria"].get(name)
        if value is None:
            continue
        if isinstance(value, Mapping):
            if not {"chosen", "rejected"} <= value.keys():
                raise RowFault("criterion without chosen and rejected", str(name))
            found[name] = value["chosen"], value["rejected"]
            continue
        if not isinstance(responses, (list, tuple)):
            raise RowFault("missing column", "responses")
        if isinstance(value, list):
            found[name] = _best_and_worst(responses, value)
        elif len(responses) == 2 and value in (0, 1) and _is_number(value):
            found[name] = responses[int(value)], responses[1 - int(value)]
        else:
            raise RowFault("criterion is no scores and no 0 or 1", str(name))
    return found


def _annotated_choices(row: Mapping, criteria: Mapping) -> dict[str, tuple | None]:
    answers = row["completions"]
    if not all(isinstance(a, Mapping) and "response" in a for a in answers):
        raise RowFault("missing column", "response of completions")
    known = criteria_names(row)
    found: dict[str, tuple | None] = {}
    for name in criteria:
        if name in known:
            scores = [_rating(answer, name) for answer in answers]
            found[name] = _best_and_worst([a["response"] for a in answers], scores)
    return found


def _rating(answer: Mapping, name: str) -> float | None:
    """A rating as text, such as "4"; None where there is none, such as "N/A"."""
    notes = answer.get("annotations")
    value = notes.get(name) if isinstance(notes, Mapping) else None
    value = value.get("Rating") if isinstance(value, Mapping) else value
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return None


def _best_and_worst(answers: Any, scores: list) -> tuple | None:
    if len(scores) != len(answers):
        raise RowFault("not one score for each response")
    if not all(s is None or _is_number(s) for s in scores):
        raise RowFault("score is not a number")
    known = [i for i, score in enumerate(scores) if score is not None]
    if not known:
        return None
    best = max(known, key=lambda i: scores[i])
    worst = min(known, key=lambda i: scores[i])
    if scores[best] == scores[worst]:
        return None
    return answers[best], answers[worst]


def _read_label(row: Mapping, kind: str, prompt: str, read: Any) -> PreferenceRow:
    if kind != "labels":
        raise RowFault("labels need loss_type kto")
    label, completion = row["label"], row["completion"]
    if not isinstance(label, (bool, int, float)) or label not in (0, 1):
        raise RowFault("label is not 0 or 1")
    has_prompt = _has(row, prompt, *_PROMPTS)
    if isinstance(completion, str):
        if not has_prompt:
            raise RowFault("missing column", prompt)
        other: Any = "-" if completion.strip() != "-" else "+"
    else:
        completion = as_messages(completion, "completion")
        # All turns but the last may repeat the prompt.
        text = "-" if completion[-1].get("content") != "-" else "+"
        other = [*completion[:-1], {"role": "assistant", "content": text}]
    pair = read(completion, other, "labelled", labels=float(label))
    pair.rejected = None
    return pair


def _singles(pair: PreferenceRow) -> list[PreferenceRow]:
    if pair.rejected is None:
        return [pair]
    if pair.values:
        raise RowFault("criteria have no labels")
    return [
        replace(pair, chosen=answer, rejected=None, values={"labels": label})
        for answer, label in ((pair.chosen, 1.0), (pair.rejected, 0.0))
    ]
