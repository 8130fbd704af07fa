# Copyright © 2026 MLX Contributors

"""From answers and their labels to the rows that ``mlx_lm.dpo`` trains on."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from ..digest import digest
from ..errors import InputError
from ..files import json_text, write_text, writing
from ..terminal import counted, rprint
from ..watch.texts import MOST_TEXT
from .answers import ANSWERS, Answers, Key, read_answers
from .labels import BAD, LABELS, NONE, REWARD, Label, orders, read_labels
from .lengths import without_length
from .summary import length_lines

PAIRS, WEIGHTS = ("best", "all", "ranking"), ("agreement",)
# Why a prompt gives no pair.
UNLABELLED, FAILED = "not labelled", "without a verdict"
TIES, ALL_BAD, SINGLE = "tied", "all bad", "with one answer"
ALIKE, EMPTY = "with equal answers", "with an empty answer"
LENGTH = "won by a cut answer"
UNSURE = "of weight 0"
# Columns that the chat template needs.
TEMPLATE_COLUMNS = "tools", "chat_template_kwargs"
Labels = Mapping[str, Label]


@dataclass(frozen=True)
class Opinion:
    """What those judges that count say together of one prompt's responses."""

    labels: list[Label]
    #: Mean places around 0, low for good ones; NaN where nobody compared.
    places: list[float]
    edited: dict[str, Any] | None = None

    def weight(self, better: int, worse: int) -> float:
        """2 p - 1, where p is how sure it is that the label is right."""
        sure = []
        for label in self.labels:
            sign = _sign(label, better, worse, len(self.places))
            certainty = 1.0 if label.certainty is None else label.certainty
            if sign is not None:
                sure.append(0.5 + sign * (certainty - 0.5))
        return 2 * sum(sure) / len(sure) - 1 if sure else 1.0

    def agreement(self, better: int, worse: int) -> float:
        """The share of the judges who ordered two responses so."""
        signs = [_sign(x, better, worse, len(self.places)) for x in self.labels]
        signs = [sign for sign in signs if sign is not None]
        return signs.count(1) / len(signs) if signs else 1.0


def _sign(label: Label, better: int, worse: int, size: int) -> int | None:
    """1 where a judge has the better one first, -1 the other, None neither."""
    found = orders(label, size)
    if better < worse:
        return found.get((better, worse))
    sign = found.get((worse, better))
    return None if sign is None else -sign


def opinion(labels: Labels, size: int) -> Opinion | str:
    """What judges say together, people before programs; or why there is nothing."""
    if not labels:
        return UNLABELLED
    said = [label for label in labels.values() if label.verdict != NONE]
    if not said:
        return FAILED
    said = [label for label in said if label.is_human] or said
    # What a policy has learned is no second opinion on what it learned from.
    said = [label for label in said if label.judge != REWARD] or said
    edited = next((x.edited for x in reversed(said) if x.edited), None)
    if all(label.verdict == BAD for label in said) and not edited:
        return ALL_BAD
    sums, counts = [0.0] * size, [0] * size
    for label in said:
        places = label.places(size) or []
        # A judge may have compared some of them only.
        middle = (sum(not math.isnan(x) for x in places) - 1) / 2
        for i, place in enumerate(places):
            if not math.isnan(place):
                sums[i] += place - middle
                counts[i] += 1
    means = [s / n if n else math.nan for s, n in zip(sums, counts)]
    known = {x for x in means if not math.isnan(x)}
    return TIES if len(known) < 2 and not edited else Opinion(said, means, edited)


@dataclass(frozen=True)
class Side:
    """One answer of a pair: a response, or what a person made of it."""

    text: str
    tokens: list[int] | None = None
    number: int | None = None
    is_cut: bool = False


def answer_pairs(
    answer: Answers, found: Opinion, which: str
) -> list[tuple[Side, Side]] | str:
    """The pairs of one prompt, the widest apart first, or why there is none."""
    sides, places = _sides(answer, found)
    order = sorted(
        (i for i, place in enumerate(places) if not math.isnan(place)),
        key=lambda i: (places[i], sides[i].is_cut),
    )
    better = [(i, j) for i, j in combinations(order, 2) if places[i] < places[j]]
    better.sort(key=lambda pair: places[pair[0]] - places[pair[1]])
    reason, kept = TIES, []
    for i, j in better:
        fault = _fault(sides[i], sides[j])
        if fault is None:
            kept.append((sides[i], sides[j]))
        elif reason == TIES:
            reason = fault
    if not kept:
        return reason
    return kept[:1] if which == "best" else kept


def _sides(answer, found):
    """The responses and, before them, the one that a person edited."""
    sides = [
        Side(one.text, one.tokens, i, not one.finished)
        for i, one in enumerate(answer.responses)
    ]
    places = list(found.places)
    if found.edited and found.edited["text"] != sides[found.edited["response"]].text:
        # Better than all, its own original among them.
        sides.append(Side(found.edited["text"]))
        places = [0.0 if math.isnan(place) else place for place in places]
        places.append(min(places) - 1)
    return sides, places


def _fault(better: Side, worse: Side) -> str | None:
    """Why a pair is left out."""
    if better.text == worse.text:
        return ALIKE
    if not better.text.strip() or not worse.text.strip():
        return EMPTY
    return LENGTH if better.is_cut and not worse.is_cut else None


def _row(answer, found, pair, weights):
    better, worse = pair
    row = {**_head(answer), "chosen": _said(answer, better)}
    row["rejected"] = _said(answer, worse)
    for name, side in (("chosen", better), ("rejected", worse)):
        if side.tokens is not None:
            row[f"{name}_tokens"] = side.tokens
    if better.number is not None and worse.number is not None:
        numbers = better.number, worse.number
        if len(found.labels) > 1:
            row["agreement"] = round(found.agreement(*numbers), 6)
        if weights:
            row["weight"] = round(found.weight(*numbers), 6)
    elif weights:
        row["weight"] = 1.0
    return row


def _ranking_row(answer, pairs):
    """The answers of some pairs in one order, the best first, without ties."""
    sides = [better for better, _ in pairs] + [worse for _, worse in pairs]
    beaten = Counter(id(worse) for _, worse in pairs)
    ranked: list[Side] = []
    for side in sorted({id(x): x for x in sides}.values(), key=lambda x: beaten[id(x)]):
        # Of answers in one place the first stands for all.
        if not ranked or beaten[id(side)] > beaten[id(ranked[-1])]:
            ranked.append(side)
    row = {**_head(answer), "ranking": [_said(answer, side) for side in ranked]}
    row["ranking_tokens"] = [side.tokens for side in ranked]
    return row


def _head(answer):
    columns = {k: v for k, v in answer.row.items() if k in TEMPLATE_COLUMNS}
    head = {"id": answer.id, "round": answer.round, "prompt": answer.prompt}
    return {**head, **columns}


def _said(answer, side):
    is_text = isinstance(answer.prompt, str)
    return side.text if is_text else [{"role": "assistant", "content": side.text}]


def make_rows(
    answers: Sequence[Answers],
    labels: Mapping[Key, Labels],
    which: str = "best",
    weights: str | None = None,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows of all prompts, and how many give none for which reason."""
    if which not in PAIRS or weights not in (None, *WEIGHTS):
        raise InputError(
            f"pairs is one of {', '.join(PAIRS)}, weights is agreement or not given: "
            f"got {which!r} and {weights!r}."
        )
    if which == "ranking" and weights:
        raise InputError("weights belong to pairs: leave them out with rankings.")
    rows: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for answer in answers:
        size = len(answer.responses)
        found = opinion(labels.get(answer.key, {}), size) if size > 1 else SINGLE
        pairs = found if isinstance(found, str) else answer_pairs(answer, found, which)
        if isinstance(pairs, str):
            left_out[pairs] += 1
            continue
        assert isinstance(found, Opinion)
        if which == "ranking":
            rows.append(_ranking_row(answer, pairs))
            continue
        made = [_row(answer, found, pair, weights) for pair in pairs]
        # Votes that balance say nothing.
        kept = [row for row in made if row.get("weight", 1) > 0]
        left_out[UNSURE] += not kept
        rows += kept
    return rows, +left_out


def check_own(
    folder: str | Path, export: str | Path | None = None, *read: str | Path
) -> None:
    """Check that nothing is overwritten but pairs that were made of a folder's labels,
    least of all what is ``read``."""
    if os.path.lexists(folder) and not Path(folder).is_dir():
        raise InputError(f"{folder} is no folder: name another one with --output.")
    pairs = [Path(folder) / f"{name}.jsonl" for name in ("train", "valid")]
    for path in pairs:
        if path.is_file() and not _begins_with(path, "id", "round"):
            raise InputError(
                f"{path} holds no pairs of this command, which would write its own "
                "there: name another folder with --output."
            )
    if export is None:
        return
    own = [*pairs, *(Path(folder) / name for name in (ANSWERS, LABELS)), *read]
    if any(_is_same(export, path) for path in own):
        raise InputError(
            f"{export} is used by this command: name another file with --export."
        )
    if Path(export).is_file() and not _begins_with(export, "chosen", "rejected"):
        raise InputError(
            f"{export} holds something else than pairs: name another file with "
            "--export, or remove it."
        )


def _begins_with(path, *columns):
    """Whether a file is empty, or its first row has some columns."""
    with suppress(OSError, ValueError, RecursionError), open(path, "rb") as file:
        first = file.readline(MOST_TEXT)
        row = json.loads(first) if first else dict.fromkeys(columns)
        return isinstance(row, dict) and row.keys() >= {*columns}
    return False


def _is_same(one, other):
    return os.path.realpath(one) == os.path.realpath(other)


def _read(folder, length_penalty):
    """The answers and labels of a folder, rewards less the penalty for each token."""
    answers = read_answers(folder)
    labels = read_labels(folder, answers)
    labels, penalty = without_length(answers, labels, length_penalty)
    if penalty is not None:
        aim = (
            "" if length_penalty is not None else ": chosen ones are as long as others"
        )
        rprint(f"{REWARD}: a token of an answer costs {penalty:.4f} nats{aim}.")
    return answers, labels


def write_pairs(
    folder: str | Path,
    pairs: str = "best",
    weights: str | None = None,
    length_penalty: float | None = None,
    valid_fraction: float = 0.1,
    seed: int = 0,
) -> dict[str, int]:
    """Write the pairs of a folder's answers as its training and validation sets."""
    folder = Path(folder)
    answers, labels = _read(folder, length_penalty)
    rows, left_out = make_rows(answers, labels, pairs, weights)
    train, valid = write_splits(folder, rows, valid_fraction, seed)
    noun = "ranking" if pairs == "ranking" else "pair"
    text = f"{folder}: {counted(len(rows), noun)} of {counted(len(answers), 'prompt')}"
    rprint(f"{text}, {train:,} to train on and {valid:,} for validation.")
    if left_out:
        parts = [f"{count:,} {reason}" for reason, count in left_out.most_common()]
        rprint(f"Prompts left out: {', '.join(parts)}.")
    for line in length_lines(rows):
        rprint(line)
    if weights:
        rprint("To have pairs count by their weight: --weight-feature weight")
    return {"rows": len(rows), "train": train, "valid": valid, **left_out}


def write_splits(
    folder: Path, rows: Sequence[dict[str, Any]], valid_fraction: float, seed: int = 0
) -> tuple[int, int]:
    """Write rows as the training and validation sets of a folder; how many each has."""
    train: list[dict[str, Any]] = []
    valid: list[dict[str, Any]] = []
    for row in rows:
        # A prompt is always on the same side, whatever the others.
        place = int(digest(seed, row["prompt"], size=8), 16) / 2**64
        (valid if place < valid_fraction else train).append(row)
    if not train:
        train, valid = valid, []
    for name, part in (("valid", valid), ("train", train)):
        path = folder / f"{name}.jsonl"
        if part:
            _write_rows(path, part)
        else:
            with writing(path):
                path.unlink(missing_ok=True)
    return len(train), len(valid)


def export_pairs(
    folder: str | Path,
    file: str | Path,
    pairs: str = "best",
    weights: str | None = None,
    length_penalty: float | None = None,
) -> int:
    """Write the pairs of a folder's answers for other tools, in the columns of TRL."""
    if pairs == "ranking":
        raise InputError(
            "Other tools read no rankings: export with --pairs best or all."
        )
    answers, labels = _read(folder, length_penalty)
    rows, _ = make_rows(answers, labels, pairs, weights)
    if not rows:
        raise InputError(f"{folder} holds no pairs yet: label its answers first.")
    names = ("prompt", "chosen", "rejected", *TEMPLATE_COLUMNS, "weight")
    _write_rows(file, [{k: row[k] for k in names if k in row} for row in rows])
    rprint(f"Wrote {counted(len(rows), 'pair')} to {file}.")
    return len(rows)


def _write_rows(path, rows):
    write_text(path, "".join(json_text(row) + "\n" for row in rows))
