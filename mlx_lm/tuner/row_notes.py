# Copyright © 2026 MLX Contributors

"""Notes on the raw rows of a dataset: how many, which were skipped, and why."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .labelled_rows import KNOWN_SHAPES as LABELLED_SHAPES
from .labelled_rows import NO_WEIGHT
from .preference_rows import KNOWN_SHAPES, TIE
from .row_tokens import TOO_LONG

# Rows that are left out by rule, not because something is wrong with them.
_NOT_BAD = {TIE, TOO_LONG, NO_WEIGHT}


@dataclass(frozen=True)
class RowNotes:
    """
    What is known of the raw rows that a dataset was made of.

    Args:
        num_rows (int): How many rows there were.
        skipped (Mapping): Reasons, and how many rows could not be used for each.
        first_skipped (Mapping): Reasons, and the place of the first such row.
        details (Mapping): Reasons, and what else is known of that row.
        dropped_tail (Sequence): The first token ids that a prompt alone has and a
            prompt with an answer has not.
        criteria (Sequence): Names of all criteria that rows have.

    Example:
        >>> notes = RowNotes(3, {"empty": 1}, {"empty": 2}, {"empty": "chosen"})
        >>> notes.lines()
        ['[WARNING] Skipped 1 row: empty (first: row 2, chosen).']
        >>> notes.check("prefs", used=2, max_length=8, max_bad_rows=0.5)
        >>> notes.of_part(1).lines(), RowNotes.joined([notes, notes]).num_rows
        ([], 6)
        >>> notes.check_criteria("prefs", ["honest"])
        Traceback (most recent call last):
        ...
        ValueError: prefs: no row has the criterion 'honest'. There are: none.
    """

    num_rows: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    first_skipped: Mapping[str, str | int] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)
    dropped_tail: Sequence[int] = ()
    criteria: Sequence[str] = ()

    def of_part(self, num_rows: int) -> "RowNotes":
        """
        Notes on some of the rows, none of which was skipped.

        Args:
            num_rows (int): How many rows.

        Returns:
            RowNotes: The notes.
        """
        tail, criteria = self.dropped_tail, self.criteria
        return RowNotes(num_rows, dropped_tail=tail, criteria=criteria)

    @staticmethod
    def joined(parts: Sequence["RowNotes"]) -> "RowNotes":
        """
        Notes on the rows of several datasets.

        Args:
            parts (Sequence): Notes on each, at least one.

        Returns:
            RowNotes: The sums, and of what comes first the first.
        """
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
            parts[0].criteria,
        )

    def lines(self) -> list[str]:
        """
        Say how many rows were skipped, and why.

        Returns:
            list: A line for each reason; with [WARNING] where a row is bad.
        """
        return [
            f"{'' if reason in _NOT_BAD else '[WARNING] '}Skipped "
            f"{self._describe(reason, count)}."
            for reason, count in Counter(self.skipped).most_common()
        ]

    def check(
        self, source: str, used: int, max_length: int, max_bad_rows: float
    ) -> None:
        """
        Refuse data of which too little can be used.

        Args:
            source (str): A name of the data, for the message.
            used (int): How many pairs the rows gave.
            max_length (int): The most tokens of prompt and answer.
            max_bad_rows (float): The largest share of bad rows.

        Raises:
            ValueError: If no row can be used, or too many are bad.
        """
        if not self.num_rows:
            raise ValueError(f"{source} has no rows.")
        if not used:
            worst = self._describe(*Counter(self.skipped).most_common(1)[0])
            hint = f"Known shapes: {'; '.join((*KNOWN_SHAPES, *LABELLED_SHAPES))}."
            if TOO_LONG in self.skipped:
                hint = f"Raise max_seq_length, which is {max_length:,}."
            raise ValueError(
                f"{source}: no row of {self.num_rows:,} can be used. Skipped "
                f"{worst}. {hint}"
            )
        bad = Counter({k: n for k, n in self.skipped.items() if k not in _NOT_BAD})
        if bad.total() > max_bad_rows * self.num_rows:
            worst = self._describe(*bad.most_common(1)[0])
            raise ValueError(
                f"{source}: {bad.total():,} of {self.num_rows:,} rows are bad, "
                f"more than max_bad_rows ({max_bad_rows:g}) allows. Most often {worst}. "
                "Mend the data, or raise max_bad_rows."
            )

    def check_criteria(self, source: str, wanted: Iterable[str]) -> None:
        """
        Refuse criteria that no row has.

        Args:
            source (str): A name of the data, for the message.
            wanted (Iterable): Names of criteria.

        Raises:
            ValueError: If one is missing; the message lists those that are there.
        """
        for name in wanted:
            if str(name) not in self.criteria:
                known = ", ".join(map(repr, self.criteria[:20])) or "none"
                raise ValueError(
                    f"{source}: no row has the criterion {name!r}. There are: {known}."
                )

    def _describe(self, reason: str, count: int) -> str:
        place, detail = self.first_skipped[reason], self.details[reason]
        place = place if isinstance(place, str) else f"row {place}"
        detail = f", {detail}" if detail else ""
        return f"{counted(count, 'row')}: {reason} (first: {place}{detail})"


def counted(number: int, noun: str) -> str:
    """
    Put a number before a noun.

    Args:
        number (int): How many.
        noun (str): What, one of them.

    Returns:
        str: Both, the noun in the plural where there are more or none.

    Example:
        >>> counted(1, "row"), counted(2000, "pair")
        ('1 row', '2,000 pairs')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
