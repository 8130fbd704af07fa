# Copyright © 2026 MLX Contributors

"""What is known of raw rows: how many, of what shape, skipped, cut."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import InputError
from .pairs import TIE
from .rankings import KNOWN_SHAPES, NO_WEIGHT
from .table import CUT, EQUAL, PARTED, REWRITTEN, SPECIAL, TokenColumns

TOO_LONG = "prompt fills max_length"
# Rows that are left out by rule, not because something is wrong with them.
_NOT_BAD = {TIE, TOO_LONG, NO_WEIGHT}


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

    def of_part(self, num_rows: int) -> "RowNotes":
        """Notes on some of the rows, none of which was skipped."""
        return replace(
            self, num_rows=num_rows, skipped={}, first_skipped={}, details={}
        )

    @staticmethod
    def joined(parts: Sequence["RowNotes"]) -> "RowNotes":
        """Notes on the rows of several datasets."""
        first: dict[str, str | int] = {}
        details: dict[str, str] = {}
        skipped: Counter[str] = Counter()
        for part in parts:
            skipped.update(part.skipped)
            first = {**part.first_skipped, **first}
            details = {**part.details, **details}
        return RowNotes(
            sum(part.num_rows for part in parts),
            skipped,
            first,
            details,
            next((part.dropped_tail for part in parts if part.dropped_tail), ()),
            next((part.special_token for part in parts if part.special_token), ""),
            parts[0].criteria,
        )

    def lines(self) -> list[str]:
        """Say how many rows were skipped, and why."""
        return [
            f"{'' if reason in _NOT_BAD else '[WARNING] '}Skipped "
            f"{self._describe(reason, count)}."
            for reason, count in Counter(self.skipped).most_common()
        ]

    def check(
        self, source: str, used: int, max_length: int, max_bad_rows: float
    ) -> None:
        """Refuse data of which too little can be used."""
        if not self.num_rows:
            raise InputError(f"{source} has no rows.")
        if not used:
            worst = self._describe(*Counter(self.skipped).most_common(1)[0])
            hint = f"Known shapes: {'; '.join(KNOWN_SHAPES)}."
            if TOO_LONG in self.skipped:
                hint = f"Raise max_seq_length, which is {max_length:,}."
            raise InputError(
                f"{source}: no row of {self.num_rows:,} can be used. Skipped "
                f"{worst}. {hint}"
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
        place, detail = self.first_skipped[reason], self.details[reason]
        place = place if isinstance(place, str) else f"row {place}"
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
            f"{labels[0]:g}, and KTO learns by comparing both kinds: add "
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


def counted(number: int, noun: str) -> str:
    """Put a number before a noun."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
