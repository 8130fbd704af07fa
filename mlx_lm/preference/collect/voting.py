# Copyright © 2026 MLX Contributors

"""One person's votes: what was judged, what comes next. Each is on the disk at once."""

import os
import threading
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from ..digest import digest
from ..errors import InputError
from ..run.reading import read_lines
from .answers import Answers, read_answers
from .labels import (
    BAD,
    HUMAN,
    LABELS,
    NONE,
    RANKING,
    TIE,
    WITHDRAWN,
    Key,
    Label,
    append_label,
    fits,
    is_about,
    new_labels,
    orders,
    read_labels,
    share_and_kappa,
)

# Votes that say how fast somebody is, and the seconds that a pause counts for.
RECENT, LONGEST_PAUSE = 20, 120.0
# Characters of an edited answer.
LONGEST_EDIT = 200_000
SKIPPED = "skipped"
REVIEW = "review.jsonl"


class Refused(Exception):
    """A request that can't be done, with HTTP's status for it."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


@dataclass
class Question:
    """A prompt, the order in which its answers are shown, and who said what of them."""

    number: int
    answers: Answers
    shown: list[int]
    #: The person's own labels, oldest first.
    own: list[Label] = field(default_factory=list)
    others: dict[str, Label] = field(default_factory=dict)


class Voting:
    """The votes of one person on the answers of a folder, or on some ``again``."""

    def __init__(
        self,
        folder: str | Path,
        name: str,
        again: Mapping[Key, str] | None = None,
        mark: str = "",
    ):
        self.folder, self.judge, self.mark = Path(folder), HUMAN + name, mark
        self._lock = threading.RLock()
        self._read = 0
        self._first_open = 0
        self._counts: Counter[str] = Counter()
        self._alike: dict[str, Counter] = {}
        # The prompts with votes, the last one at the end.
        self._order: dict[Key, None] = {}
        self.questions: dict[Key, Question] = {}
        self._why, found = again or {}, read_answers(self.folder)
        if again is not None:
            # The list has the worst first.
            by_key = {answers.key: answers for answers in found}
            found = [by_key[key] for key in again if key in by_key]
        for answers in found:
            if len(answers.responses) > 1:
                shown = list(range(len(answers.responses)))
                # The same after a reload, another one for another person.
                Random(f"{self.judge} {answers.key}").shuffle(shown)
                number = len(self.questions)
                self.questions[answers.key] = Question(number, answers, shown)
        self._keys = list(self.questions)
        if not self._keys and again is not None:
            raise InputError(
                f"{folder} has nothing to look at again: none of its prompts is listed, "
                "or its judges agree."
            )
        if not self._keys:
            raise InputError(
                f"{folder} has no prompt with two different answers. Generate some with "
                "mlx_lm.dpo_collect --prompts FILE --samples 4."
            )
        self._catch_up()

    # Reading

    def _catch_up(self):
        """Read what was added to the labels, by this or another process."""
        path = self.folder / LABELS
        size = path.stat().st_size if path.exists() else 0
        if size < self._read:
            raise Refused(500, f"{path} became shorter: start the command again.")
        if size > self._read:
            labels, self._read = new_labels(path, self._read)
            for label in labels:
                self._take(label)

    def _take(self, label):
        question = self.questions.get(label.key)
        if question is None or not is_about(label, question.answers):
            return
        self._count(question, -1)
        if label.judge != self.judge:
            question.others[label.judge] = label
            if label.verdict == WITHDRAWN:
                del question.others[label.judge]
        else:
            question.own.append(label)
            self._order.pop(label.key, None)
            if self._is_open(question):
                self._first_open = min(self._first_open, question.number)
            else:
                self._order[label.key] = None
        self._count(question, 1)

    def _is_open(self, question):
        if not question.own or question.own[-1].verdict == WITHDRAWN:
            return True
        return not self._is_marked(question.own[-1])

    def _is_marked(self, label):
        """Whether a label is of this look at the prompt, not of an earlier one."""
        return str(label.why or "").startswith(self.mark)

    def _count(self, question, times):
        """Add a prompt to what was counted, or take it out again."""
        if self._is_open(question):
            return
        label, size = question.own[-1], len(question.answers.responses)
        self._counts[label.verdict] += times
        self._counts["edited"] += times * bool(label.edited)
        mine = orders(label, size)
        for judge, other in question.others.items():
            theirs = orders(other, size)
            counts = self._alike.setdefault(judge, Counter())
            for pair in mine.keys() & theirs.keys():
                counts[mine[pair], theirs[pair]] += times

    # What is known

    @property
    def done(self) -> int:
        """How many prompts are judged, or were skipped."""
        return len(self._order)

    def counts(self) -> dict[str, int]:
        """How many prompts got each verdict, and how many answers were edited."""
        return {k: self._counts[k] for k in (RANKING, TIE, BAD, NONE, "edited")}

    def agreements(self) -> list[dict[str, Any]]:
        """How often each other judge ordered two answers as this person does."""
        found = []
        for judge, counts in self._alike.items():
            # What was taken back leaves zeros behind.
            if pairs := (+counts).total():
                share, kappa = share_and_kappa(+counts)
                found.append(
                    {"judge": judge, "pairs": pairs, "share": share, "kappa": kappa}
                )
        return sorted(found, key=lambda x: -x["pairs"])

    def pace(self) -> float | None:
        """Votes a minute, of the last ones, None before there are three."""
        recent = deque(self._order, RECENT)
        seconds = [_seconds(self.questions[key].own[-1].seconds) for key in recent]
        known = [min(s, LONGEST_PAUSE) for s in seconds if s is not None]
        return len(known) / max(sum(known), 1e-3) * 60 if len(known) > 2 else None

    def version(self) -> int:
        """A number that grows with every label of anybody."""
        with self._lock:
            self._catch_up()
            return self._read

    def state(self, key: Key | None = None) -> dict[str, Any]:
        """All that the page shows, with a given prompt if that is still open."""
        with self._lock:
            self._catch_up()
            question = self.questions.get(key) if key else None
            if question is None or not self._is_open(question):
                question = self._next()
            last = next(reversed(self._order), None)
            return {
                "judge": self.judge,
                "version": self._read,
                "review": bool(self.mark),
                "done": self.done,
                "total": len(self._keys),
                "counts": self.counts(),
                "pace": self.pace(),
                "agreement": self.agreements(),
                "last": last and {"round": last[0], "id": last[1]},
                "item": question and self._describe(question),
            }

    def _next(self):
        while self._first_open < len(self._keys):
            question = self.questions[self._keys[self._first_open]]
            if self._is_open(question):
                return question
            self._first_open += 1
        return None

    def _describe(self, question):
        answers, was = question.answers, None
        # A vote taken back: what was edited is offered again.
        if len(question.own) > 1 and question.own[-1].verdict == WITHDRAWN:
            was = asdict(question.own[-2])
        return {
            "id": answers.id,
            "round": answers.round,
            "number": question.number + 1,
            "prompt": answers.prompt,
            "row": answers.row,
            "answers": [
                {
                    "number": i,
                    "text": answers.responses[i].text,
                    "finish": answers.responses[i].finish,
                }
                for i in question.shown
            ],
            "was": was,
        }

    # Voting

    def vote(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Store a vote, wait until it is on the disk, and tell what comes next."""
        with self._lock:
            self._catch_up()
            question, label = self._read_vote(request)
            if not self._is_open(question):
                # Sent twice, because the answer to the first was lost on its way.
                said = question.own[-1]
                if _words(said) != _words(label):
                    raise Refused(
                        409, "Judged elsewhere meanwhile: that vote was kept."
                    )
                label = said
            else:
                append_label(self.folder, label)
            state = self.state()
            if self.mark:
                state["earlier"] = self._earlier(question, label)
                state["why"] = self._why.get(question.answers.key, "")
            return state

    def _read_vote(self, request):
        question = self._question(request)
        verdict, why = request.get("verdict"), self.mark or None
        shown, before = question.shown, self._before(question)
        if verdict == NONE:
            why = " ".join(filter(None, (self.mark, SKIPPED)))
            if before is not None:
                # A second look that leaves it as it was.
                return question, Label(**{**asdict(before), "why": why})
        label = Label(
            question.answers.id,
            self.judge,
            str(verdict),
            question.answers.round,
            ranking=request.get("ranking") if verdict == RANKING else None,
            edited=request.get("edited"),
            shown=shown,
            seconds=_seconds(request.get("seconds")),
            why=why,
            of=question.answers.mark,
        )
        size = len(question.answers.responses)
        is_known = verdict in (RANKING, TIE, BAD, NONE) and fits(label, size)
        if not is_known or not _is_edit(label):
            raise Refused(400, "That is no vote on these answers.")
        return question, label

    def _question(self, request):
        key = request.get("round"), request.get("id")
        try:
            return self.questions[key]
        except (KeyError, TypeError):
            raise Refused(400, "There is no such prompt here.") from None

    def _before(self, question):
        """The person's own label before this second look at it."""
        if not self.mark or not question.own:
            return None
        seen = [label for label in question.own if not self._is_marked(label)]
        return seen[-1] if seen and seen[-1].verdict != WITHDRAWN else None

    def _earlier(self, question, label):
        """What this and other judges had said, and whether it is what is said now."""
        size = len(question.shown)
        mine, before = orders(label, size), self._before(question)
        earlier = [*([before] if before else []), *question.others.values()]
        theirs = [orders(other, size) for other in earlier]
        return [
            {**asdict(other), "same": order == mine if order and mine else None}
            for other, order in zip(earlier, theirs)
        ]

    def undo(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Take back a vote, and ask for it again."""
        with self._lock:
            self._catch_up()
            question = self._question(request)
            if not self._is_open(question):
                append_label(self.folder, self._taken_back(question))
            return self.state(question.answers.key)

    def _taken_back(self, question):
        if before := self._before(question):
            return before
        round_, id_ = question.answers.key
        return Label(id_, self.judge, WITHDRAWN, round_)

    def again(self) -> dict[str, Any]:
        """Ask again for all that was skipped."""
        with self._lock:
            self._catch_up()
            for key in [*self._order]:
                question = self.questions[key]
                if question.own[-1].verdict == NONE:
                    append_label(self.folder, self._taken_back(question))
            return self.state()

    def finished(self) -> threading.RLock:
        """What is held while a vote is written: none is cut short by the end."""
        return self._lock


def read_review(
    folder: str | Path, output: str | Path, judge: str = ""
) -> tuple[dict[Key, str], str]:
    """Prompts to look at again, and why: a run listed them, or judges disagree. And a
    mark of the look, the same when that goes on."""
    path = Path(folder) / REVIEW
    if path.exists():
        rows = read_lines(path, id=(str,))
        looks = {
            (row.get("round", 0), row["id"]): str(row.get("why", ""))
            for row in rows
            if type(row.get("round", 0)) is int
        }
        return looks, f"review {digest(sorted(looks), size=4)}"
    if os.path.realpath(folder) != os.path.realpath(output):
        raise InputError(
            f"{folder} has no {REVIEW}, in which the test of a run lists labels that may "
            f"be wrong, if it finds any. Or name {output} itself: those on which its "
            "judges disagree."
        )
    answers = read_answers(output)
    sizes = {x.key: len(x.responses) for x in answers}
    found = read_labels(output, answers)
    looks = {
        key: "judges disagree"
        for key, labels in found.items()
        if _disagree([orders(label, sizes[key]) for label in labels.values()])
    }
    # Who agrees after a look is listed no more; the others were looked at all the same.
    others = {name for labels in found.values() for name in labels} - {judge}
    return looks, f"review {digest(sorted(others), size=4)}"


def _disagree(found):
    """Whether two judges put the same two answers in opposite orders."""
    said = {(pair, order) for one in found for pair, order in one.items()}
    return any((pair, -order) in said for pair, order in said if order)


def _words(label):
    """What a vote says, without how it came about."""
    return label.verdict, label.ranking, label.edited


def _seconds(value):
    is_number = type(value) in (int, float) and 0 <= value < 1e7
    return round(float(value), 1) if is_number else None


def _is_edit(label):
    if label.edited is None:
        return True
    text = label.edited["text"]
    return (
        label.verdict == RANKING
        and set(label.edited) == {"response", "text"}
        and bool(text.strip())
        and len(text) <= LONGEST_EDIT
        and label.edited["response"] in label.ranking[0]
    )
