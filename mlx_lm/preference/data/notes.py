# Copyright © 2026 MLX Contributors

"""What is known of raw rows: how many, of what shape, skipped, cut."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import InputError
from ..terminal import counted
from .content import RowFault
from .pairs import TIE, PreferenceRow
from .row import ANSWERS, PROMPT
from .shapes import KNOWN_SHAPES, NO_WEIGHT
from .sources import SPLIT_ALIASES
from .table import CUT, ENDLESS, EQUAL, PARTED, REWRITTEN, SPECIAL, TokenColumns
from .tokenizer import TokenPair

TOO_LONG = "prompt fills max_length"
# Rows that are left out by rule, not because something is wrong with them.
_NOT_BAD = {TIE, TOO_LONG, NO_WEIGHT}
_WARNING = "[WARNING] "
# What rows of several splits in one file, such as HelpSteer2's, are marked with.
_SPLITS = {name for names in SPLIT_ALIASES.values() for name in names}


class NotesBuilder:
    """Collects notes row by row."""

    def __init__(self) -> None:
        self.criteria: set[str] = set()
        self._num_rows = 0
        self._skipped: Counter[str] = Counter()
        self._first_skipped: dict[str, str | int] = {}
        self._details: dict[str, str] = {}
        self._dropped_tail: list[int] = []
        self._special_token = ""
        self._columns: dict[str, dict[str, None]] = {}
        self._unread: dict[str, None] = {}
        self._choices: dict[str, None] = {}
        self._remarks: dict[str, tuple[int, str | int]] = {}
        self._splits: Counter[str] = Counter()

    def add(
        self,
        place: str | int,
        fault: RowFault | None,
        tokens: Sequence[TokenPair],
        pairs: Sequence[PreferenceRow],
    ) -> None:
        """Add what is known of one row and its pairs."""
        self._num_rows += 1
        if fault is not None:
            reason = fault.reason
            self._skipped[reason] += 1
            self._first_skipped.setdefault(reason, place)
            self._details.setdefault(reason, fault.detail)
            return
        for pair in tokens:
            self._dropped_tail = self._dropped_tail or pair.dropped
            self._special_token = self._special_token or pair.special
        row = pairs[0].row
        assert row is not None
        for role, names in row.roles.items():
            self._columns.setdefault(role, {}).update(dict.fromkeys(names))
        if isinstance(split := row.get("split"), str) and split in _SPLITS:
            self._splits[split] += 1
        self._unread.update(dict.fromkeys(row.unread()))
        self._choices.update(dict.fromkeys(row.choices))
        for text in dict.fromkeys(row.remarks):
            count, first = self._remarks.get(text, (0, place))
            self._remarks[text] = count + 1, first

    def finish(self) -> "RowNotes":
        """Make the notes."""
        return RowNotes(
            self._num_rows,
            self._skipped,
            self._first_skipped,
            self._details,
            self._dropped_tail,
            self._special_token,
            sorted(self.criteria),
            {role: list(names) for role, names in self._columns.items()},
            list(self._unread),
            list(self._choices),
            self._remarks,
            self._splits,
        )


@dataclass(frozen=True)
class RowNotes:
    """What is known of the raw rows that a dataset was made of."""

    num_rows: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    first_skipped: Mapping[str, str | int] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)
    dropped_tail: Sequence[int] = ()
    special_token: str = ""
    criteria: Sequence[str] = ()
    # The columns that were read, by what they were read as.
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unread: Sequence[str] = ()
    choices: Sequence[str] = ()
    # What was done to rows: how many, and the place of the first.
    remarks: Mapping[str, Sequence] = field(default_factory=dict)
    # Used rows by what their own column calls their split.
    splits: Mapping[str, int] = field(default_factory=dict)

    def of_part(self, num_rows: int) -> "RowNotes":
        """Notes on some of the rows, none of which was skipped."""
        names = ("skipped", "first_skipped", "details", "remarks", "splits")
        none: dict = {name: {} for name in names}
        return replace(self, num_rows=num_rows, **none)

    @staticmethod
    def joined(parts: Sequence["RowNotes"]) -> "RowNotes":
        """Notes on the rows of several parts of a dataset, or of several datasets."""
        first: dict[str, str | int] = {}
        details: dict[str, str] = {}
        skipped: Counter[str] = Counter()
        remarks: dict[str, Sequence] = {}
        splits: Counter[str] = Counter()
        columns: dict[str, Sequence[str]] = {}
        for part in parts:
            for role, names in part.columns.items():
                columns[role] = list(dict.fromkeys([*columns.get(role, ()), *names]))
            for text, (count, place) in part.remarks.items():
                before, first_place = remarks.get(text, (0, place))
                remarks[text] = (before + count, first_place)
            skipped.update(part.skipped)
            splits.update(part.splits)
            first = {**part.first_skipped, **first}
            details = {**part.details, **details}
        read = {name for names in columns.values() for name in names}
        unread = dict.fromkeys(name for part in parts for name in part.unread)
        return RowNotes(
            sum(part.num_rows for part in parts),
            skipped,
            first,
            details,
            next((part.dropped_tail for part in parts if part.dropped_tail), ()),
            next((part.special_token for part in parts if part.special_token), ""),
            sorted({name for part in parts for name in part.criteria}),
            columns,
            [name for name in unread if name not in read],
            list(dict.fromkeys(text for part in parts for text in part.choices)),
            remarks,
            splits,
        )

    def lines(self) -> list[str]:
        """Say how many rows were skipped or changed, and why."""
        lines = [
            f"{'' if reason in _NOT_BAD else _WARNING}Skipped "
            f"{self._describe(reason, count)}."
            for reason, count in Counter(self.skipped).most_common()
        ]
        for text, (count, place) in self.remarks.items():
            warning = _WARNING if text.startswith(_WARNING) else ""
            text = text.removeprefix(_WARNING)
            where = f"(first: {_named(place)})"
            lines.append(f"{warning}In {counted(count, 'row')} {text} {where}.")
        if len(self.splits) > 1:
            found = [f"{name!r} in {count:,}" for name, count in self.splits.items()]
            lines.append(
                f"[WARNING] The column 'split' says {', '.join(found)} of the rows, and "
                "all are read: keep those of each split in a file of its own, as in "
                "train.jsonl and valid.jsonl."
            )
        if self.choices:
            lines.append(f"Answers are compared by: {'; '.join(self.choices)}.")
        if self.unread:
            names = _listed([repr(name) for name in self.unread])
            lines.append(f"Columns with text that are not read: {names}.")
        return lines

    def read_as(self) -> str:
        """Say what was read as what, and what was not read."""
        # The answers hold the prompt where no column does.
        columns = {PROMPT: ["the start of the answers"], ANSWERS: [], **self.columns}
        if self.unread:
            columns["not read"] = self.unread
        found = [f"{role}: {_listed(names)}" for role, names in columns.items()]
        return " · ".join([*found, *self.choices])

    def check(
        self, source: str, used: int, max_length: int, max_bad_rows: float
    ) -> None:
        """Refuse data of which too little can be used."""
        if not self.num_rows:
            raise InputError(f"{source} has no rows.")
        if not used:
            worst = self._describe(*Counter(self.skipped).most_common(1)[0])
            hint = ""
            if self.skipped.keys() & {"unknown columns", "missing column"}:
                shapes, more = "; ".join(KNOWN_SHAPES[:8]), len(KNOWN_SHAPES) - 8
                hint = (
                    f" Known columns: {shapes}; and {more} more in DPO_REFERENCE.md. "
                    "Others are named by prompt_feature, chosen_feature and "
                    "rejected_feature."
                )
            if TOO_LONG in self.skipped:
                hint = f" Raise max_seq_length, which is {max_length:,}."
            raise InputError(
                f"{source}: no row of {self.num_rows:,} can be used. Skipped "
                f"{worst}.{hint}"
            )
        bad = Counter({k: n for k, n in self.skipped.items() if k not in _NOT_BAD})
        if bad.total() > max_bad_rows * self.num_rows:
            worst = self._describe(*bad.most_common(1)[0])
            raise InputError(
                f"{source}: {bad.total():,} of {self.num_rows:,} rows are bad, "
                f"more than max_bad_rows ({max_bad_rows:g}) allows. Most often {worst}. "
                "Mend the data, or raise max_bad_rows."
            )

    def check_criteria(self, source: str, wanted: Iterable[str]) -> None:
        """Refuse criteria that no row has."""
        for name in wanted:
            if str(name) not in self.criteria:
                known = ", ".join(map(repr, self.criteria[:20])) or "none"
                raise InputError(
                    f"{source}: no row has the criterion {name!r}. There are: {known}."
                )

    def _describe(self, reason: str, count: int) -> str:
        place, detail = _named(self.first_skipped[reason]), self.details[reason]
        detail = f", {detail}" if detail else ""
        return f"{counted(count, 'row')}: {reason} (first: {place}{detail})"


def describe(
    columns: TokenColumns,
    notes: RowNotes,
    source: str,
    noun: str,
    max_length: int,
    decode: Callable[[Sequence[int]], str],
    has_chat_template: bool,
) -> list[str]:
    """Say how many rows there are, of what shape, skipped, cut and parted."""
    kinds = columns.count_kinds()
    of = lambda n: "" if len(kinds) == 1 else f"{n:,} of "
    names = [f"{of(n)}{shape}, {form}" for (shape, form), n in kinds.most_common()]
    counts = f"{counted(len(columns), noun)} of {counted(notes.num_rows, 'row')}"
    lines = [f"{source}: {counts} ({'; '.join(names)}).", *notes.lines()]
    if cut := np.count_nonzero(columns.flags & CUT):
        lines.append(f"Cut to {max_length:,} tokens: {counted(cut, noun)}.")
    if equal := np.count_nonzero(columns.flags & EQUAL):
        lines.append(
            f"[WARNING] {counted(equal, 'pair')} have equal answers after the cut and "
            "teach nothing: raise max_seq_length."
        )
    labels = np.unique(columns.values.get("labels", ()))
    if len(labels) == 1:
        lines.append(
            f"[WARNING] All {counted(len(columns), noun)} have the label "
            f"{labels[0]:g}, and a loss of labels needs both kinds: add "
            f"{'undesirable' if labels[0] else 'desirable'} answers."
        )
    if parted := np.count_nonzero(columns.flags & PARTED):
        tail = decode(notes.dropped_tail)[-60:]
        lines.append(
            f"In {counted(parted, noun)} the prompt alone ends in other tokens than "
            f"before an answer, the answer starts where they part: {tail!r}."
        )
    if rewritten := np.count_nonzero(columns.flags & REWRITTEN):
        lines.append(
            f"In {counted(rewritten, noun)} the chat template writes the prompt "
            "otherwise once an answer follows: prompts are as mlx_lm.generate has them."
        )
    if endless := np.count_nonzero(columns.flags & ENDLESS):
        lines.append(
            f"[WARNING] In {counted(endless, noun)} the chat template writes no token "
            "after an answer that ends generation: the model is not taught to stop."
        )
    special, is_raw = (columns.flags & SPECIAL) > 0, columns.is_raw()
    if rendered := np.count_nonzero(special & is_raw):
        lines.append(
            f"The text of {counted(rendered, noun)} holds special tokens "
            f"({notes.special_token!r}), as rendered chats do: no BOS or EOS comes twice."
        )
    if spoken := np.count_nonzero(special & ~is_raw):
        lines.append(
            f"[WARNING] The messages of {counted(spoken, noun)} hold special tokens "
            f"({notes.special_token!r}), which the model takes as such, as in "
            "mlx_lm.lora: escape_special_tokens: true writes them as text."
        )
    if has_chat_template and (is_raw & ~special).any():
        lines.append(
            "[WARNING] Raw text for a model with a chat template: wrap_text: true "
            "makes turns of it."
        )
    return lines


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _named(place: str | int) -> str:
    return place if isinstance(place, str) else f"row {place}"
