# Copyright © 2026 MLX Contributors

"""Layouts that published datasets have, and what they say of which answer is better."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from ..errors import InputError
from .columns import find_question
from .content import RowFault, check_text, is_answer, is_number
from .messages import Messages, as_messages
from .pairs import TIE, PreferenceRow, make_pair
from .prompts import Prompt
from .rankings import Scored, criteria_pairs, ranked_pairs
from .row import ANSWERS, PREFERENCE, PROMPT, Reading, Row
from .turns import same_turn

# What HelpSteer2 rates, from 0 to 4.
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
# Their sign says which answer is better, their size how much.
SIGNED = ("preference_strength", "overall_preference")


def _two(
    row: Row, names: tuple[str, str], first: bool, reading: Reading, shape: str
) -> list[PreferenceRow]:
    """A pair of two columns, the first one chosen or not."""
    answers = [row.take(name, ANSWERS) for name in names]
    chosen, rejected = answers if first else answers[::-1]
    return [make_pair(row, chosen, rejected, reading, shape, find_question(row))]


def _signed(row: Row, name: str, reading: Reading) -> bool:
    """Whether a strength, which is negative for the first answer, prefers that."""
    value = row.take(name, PREFERENCE)
    if not is_number(value):
        raise RowFault("not a number", f"{name} is {value!r}")
    if value == 0:
        raise RowFault(TIE)
    if name not in (reading.weight_feature, reading.margin_feature):
        row.choices.append(f"the sign of {name}, not its size")
    return value < 0


def read_shp(row: Row, reading: Reading) -> list[PreferenceRow]:
    """Comments to a post, A and B."""
    names = "human_ref_A", "human_ref_B"
    label = row.take("labels", PREFERENCE)
    if label not in (0, 1):
        raise RowFault("label is not 0 or 1")
    chosen, rejected = (
        row.take(name, ANSWERS) for name in names[:: 1 if label else -1]
    )
    prompt = Prompt(check_text(row.take("history", PROMPT), "history"), "SHP", True)
    return [make_pair(row, chosen, rejected, reading, "SHP", prompt)]


def read_webgpt(row: Row, reading: Reading) -> list[PreferenceRow]:
    """Answers 0 and 1 with scores."""
    scores = [row.take(name, PREFERENCE) for name in ("score_0", "score_1")]
    for score in scores:
        # Only NaN differs from itself.
        if not isinstance(score, (int, float)) or score != score:
            raise RowFault("score is not a number")
    if scores[0] == scores[1]:
        raise RowFault(TIE)
    names, first = ("answer_0", "answer_1"), scores[0] > scores[1]
    return _two(row, names, first, reading, "WebGPT comparisons")


def read_strength(row: Row, reading: Reading) -> list[PreferenceRow]:
    """HelpSteer's answers 1 and 2 with a strength of -3 to 3."""
    if "preference_strength" in row:
        names, name = ("response_1", "response_2"), "preference_strength"
        return _two(
            row, names, _signed(row, name, reading), reading, "HelpSteer2 preference"
        )
    first = _signed(row, "overall_preference", reading)
    return _two(row, ("response1", "response2"), first, reading, "HelpSteer3")


def read_completions(row: Row, reading: Reading) -> list[PreferenceRow]:
    """NeMo's completions with ranks, the lowest best."""
    found = row.take("completions", ANSWERS)
    answers, ranks = _graded(found, "completion", "rank")
    return ranked_pairs(row, answers, [-rank for rank in ranks], reading, "NeMo")


def read_answers(row: Row, reading: Reading) -> list[PreferenceRow]:
    """Nectar's answers with ranks, and Stack Exchange's with scores."""
    found = row.take("answers", ANSWERS)
    if isinstance(found, list) and any("pm_score" in a for a in found if _is_map(a)):
        answers, scores = _graded(found, "text", "pm_score")
        return ranked_pairs(row, answers, scores, reading, "Stack Exchange")
    answers, ranks = _graded(found, "answer", "rank")
    return ranked_pairs(row, answers, [-rank for rank in ranks], reading, "Nectar")


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def _map(value: Any) -> Mapping:
    return value if isinstance(value, Mapping) else {}


def _graded(found: Any, answer: str, grade: str) -> tuple[list, list[float]]:
    """Answers and numbers of a list of objects; of equal answers the first."""
    if not isinstance(found, (list, tuple)) or not all(map(_is_map, found)):
        raise RowFault("wrong type", f"{answer} and {grade} are in no list of objects")
    answers: list = []
    grades = []
    for one in found:
        if one.get(answer) is None or not is_number(one.get(grade)):
            raise RowFault("answer without text or number", f"{answer}, {grade}")
        if one[answer] not in answers:
            answers.append(one[answer])
            grades.append(float(one[grade]))
    return answers, grades


def read_arena(row: Row, reading: Reading) -> list[PreferenceRow]:
    """Two models' conversations, and who won."""
    winner = str(row.take("winner", PREFERENCE))
    if winner.startswith("tie") or winner == "both_bad":
        raise RowFault(TIE)
    names = ("conversation_a", "conversation_b")
    if winner not in ("model_a", "model_b"):
        raise RowFault("winner is not model_a, model_b or tie", winner)
    sides = [as_messages(row.take(name, ANSWERS), name) for name in names]
    # MT-bench keeps both turns beside the judgment of one.
    turn = row.get("turn")
    if isinstance(turn, int) and turn > 0:
        sides = [_until_answer(side, turn) for side in sides]
    chosen, rejected = sides if winner == "model_a" else sides[::-1]
    return [make_pair(row, chosen, rejected, reading, "arena", Prompt())]


def _until_answer(messages: Messages, number: int) -> Messages:
    """A conversation up to an answer, counted from 1."""
    ends = [i for i, message in enumerate(messages, 1) if is_answer(message)]
    return messages[: ends[number - 1]] if number <= len(ends) else messages


def read_arena_lists(row: Row, reading: Reading) -> list[PreferenceRow]:
    """The same with lists of texts, or their JSON, and a column for each outcome."""
    won = [row.take(f"winner_model_{side}", PREFERENCE) for side in "ab"]
    if won not in ([0, 1], [1, 0]):
        raise RowFault(TIE)
    prompts, *answers = (
        _texts(row.take(name, role), name)
        for name, role in (
            ("prompt", PROMPT),
            ("response_a", ANSWERS),
            ("response_b", ANSWERS),
        )
    )
    sides = []
    for texts in answers:
        if len(texts) != len(prompts):
            raise RowFault("not one response for each prompt")
        turns = zip(("user", "assistant") * len(texts), chain(*zip(prompts, texts)))
        sides.append([{"role": role, "content": text} for role, text in turns])
    chosen, rejected = sides if won[0] else sides[::-1]
    return [make_pair(row, chosen, rejected, reading, "arena lists", Prompt())]


def _texts(value: Any, name: str) -> list[str]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise RowFault("unreadable JSON", name) from e
    if not isinstance(value, list) or not value:
        raise RowFault("wrong type", f"{name} is no list of texts")
    # Some models said nothing.
    return [check_text("" if text is None else text, name) for text in value]


def read_summaries(row: Row, reading: Reading) -> list[PreferenceRow]:
    """Two summaries of a post or an article, and the place of the better one."""
    info, choice = row.take("info", PROMPT), row.take("choice", PREFERENCE)
    found = row.take("summaries", ANSWERS)
    if not _is_map(info) or not isinstance(found, list) or len(found) != 2:
        raise RowFault("wrong type", "info is no object or summaries are not two")
    if choice not in (0, 1):
        raise RowFault("choice is not 0 or 1")
    texts = [check_text(s.get("text"), "summaries") for s in found if _is_map(s)]
    if len(texts) != 2:
        raise RowFault("wrong type", "summaries are no objects")
    if info.get("post"):
        names = (
            ("subreddit", "SUBREDDIT: r/"),
            ("title", "TITLE: "),
            ("post", "POST: "),
        )
        parts = [f"{head}{info[name]}" for name, head in names if info.get(name)]
    else:
        parts = [check_text(info.get("article"), "info.article or info.post")]
    prompt = Prompt("\n\n".join([*parts, "TL;DR:"]), "", is_question=reading.turns)
    if reading.turns:
        texts = [text.strip() for text in texts]
    chosen, rejected = texts if choice == 0 else texts[::-1]
    shape = "summarize from feedback"
    return [make_pair(row, chosen, rejected, reading, shape, prompt)]


def read_messages_and_rejected(row: Row, reading: Reading) -> list[PreferenceRow]:
    """A conversation that ends with the chosen answer, and the other answer."""
    column = "messages" if "messages" in row else "conversations"
    messages = as_messages(row.take(column, ANSWERS), column)
    name = next(n for n in REJECTED if n in row)
    rejected = as_messages(row.take(name, ANSWERS), name)
    shape = "messages and rejected"
    start: Any = messages[:-1]
    if not is_answer(rejected[0]) or same_turn(rejected[0], messages[0]):
        # A whole conversation as well.
        return [make_pair(row, messages, rejected, reading, shape, Prompt())]
    if not start:
        raise RowFault("no common prompt")
    prompt = Prompt(start, shape)
    return [make_pair(row, messages[-1:], rejected, reading, shape, prompt)]


REJECTED = ("rejected", "rejected_response", "rejected_messages")


def scored(row: Row) -> Scored | None:
    """What a row's criteria say of its answers, if it has several."""
    criteria = row.get("criteria")
    if isinstance(criteria, Mapping):
        found = {str(k): v for k, v in criteria.items() if v is not None}
        return Scored("criteria", found, row.get("responses"))
    if row.has(("response_0", "response_1")) and row.keys() & _SAFE_RLHF.keys():
        found = {name: row[c] for c, name in _SAFE_RLHF.items() if c in row}
        answers = [row["response_0"], row["response_1"]]
        return Scored("PKU-SafeRLHF", found, answers, {"better": 1.0})
    if _is_rating(row):
        found = {name: row[name] for name in HELPSTEER if name in row}
        if not isinstance(row["response"], list) or len(row["response"]) < 2:
            raise RowFault("one answer to its prompt")
        return Scored("HelpSteer2", found, row["response"], {"helpfulness": 1.0})
    return _ultrafeedback(row)


_SAFE_RLHF = {"better_response_id": "better", "safer_response_id": "safer"}


def _ultrafeedback(row: Row) -> Scored | None:
    answers = row.get("completions")
    if not isinstance(answers, list):
        return None
    notes = [_map(_map(answer).get("annotations")) for answer in answers]
    names = {
        str(name): None
        for note in notes
        for name, value in note.items()
        if value is not None
    }
    if not names:
        return None
    found = {name: [_rating(note, name) for note in notes] for name in names}
    if not all(_is_map(a) and "response" in a for a in answers):
        return Scored("UltraFeedback", found)
    return Scored("UltraFeedback", found, [a["response"] for a in answers])


def _rating(notes: Mapping, name: str) -> float | None:
    """A rating as text, such as "4"; None where there is none, such as "N/A"."""
    value = notes.get(name)
    value = value.get("Rating") if isinstance(value, Mapping) else value
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return None


def read_scored(row: Row, reading: Reading) -> list[PreferenceRow]:
    """A row whose answers several criteria compare."""
    found = scored(row)
    if found is None:
        if "criteria" in row:
            raise RowFault("wrong type", "criteria is no object of names")
        raise RowFault("completions without annotations")
    for name in _COMPARED:
        row.may(name, ANSWERS)
    for name in (*_SAFE_RLHF, *HELPSTEER):
        row.may(name, PREFERENCE)
    return criteria_pairs(row, found, reading)


_COMPARED = (
    *("criteria", "responses", "completions"),
    *("response", "response_0", "response_1"),
)


def _is_rating(row: Any) -> bool:
    names = ("prompt", "response", "helpfulness")
    return _is_map(row) and all(row.get(name) is not None for name in names)


def joined(rows: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """The rows with their places, HelpSteer2's answers to one prompt put together."""
    group: list = []
    for index in range(len(rows)):
        row = rows[index]
        # Some have all answers to a prompt in one row, as lists.
        is_one = _is_rating(row) and not isinstance(row["helpfulness"], list)
        same = group and is_one and row["prompt"] == group[0]["prompt"]
        if group and not same:
            yield index - len(group), _together(group)
            group = []
        if is_one:
            if getattr(rows, "is_part", False):
                raise InputError(
                    "max_rows, or a set too large for the memory, would part answers "
                    "to one prompt that stand in several rows: put them into one row, "
                    "as lists."
                )
            group.append(row)
        else:
            yield index, row
    if group:
        yield len(rows) - len(group), _together(group)


def _together(group: list[Mapping]) -> Mapping:
    names = [name for name in ("response", *HELPSTEER) if name in group[0]]
    return {**group[0], **{n: [row.get(n) for row in group] for n in names}}
