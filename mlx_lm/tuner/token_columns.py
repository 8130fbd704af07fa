# Copyright © 2026 MLX Contributors

"""Preference rows made into token ids, in a few compact NumPy arrays."""

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .preference_tokens import TokenPair

# Bits of a pair's flags: cut to the longest length, with answers that are equal
# after the cut, and with a prompt that ends in other tokens on its own.
CUT, EQUAL, PARTED = 1, 2, 4

# What pairs may bring along, and what it is where a row has none: the weight in the
# loss; a margin in nats; whether the chosen answer is desirable; the places of both
# answers in their ranking, counted from 0, -1 for a copy.
VALUES: dict[str, tuple[float, ...]] = {
    "weights": (1.0,),
    "margins": (0.0,),
    "labels": (1.0,),
    "places": (0.0, 1.0),
}


@dataclass(frozen=True, eq=False)
class TokenColumns:
    """
    Tokenized pairs, an array for each property.

    Args:
        ids (np.ndarray): The token ids of all pairs: prompt, chosen answer,
            rejected answer. int32, shape: ``(tokens,)``.
        starts (np.ndarray): Where each pair starts in ``ids``. int64, shape:
            ``(n,)``.
        others (np.ndarray): Where its rejected answer starts. int64, shape:
            ``(n,)``.
        kept (np.ndarray): Ids of its chosen answer that are there, of which
            ``lengths`` may count fewer. int32, shape: ``(n,)``.
        lengths (np.ndarray): Tokens of the prompt, and of the prompt with the
            chosen and with the rejected answer. int32, shape: ``(n, 3)``.
        largest (np.ndarray): The largest id of each pair. int32, shape: ``(n,)``.
        kinds (np.ndarray): Index into ``kind_names``. int32, shape: ``(n,)``.
        flags (np.ndarray): Bits ``CUT``, ``EQUAL`` and ``PARTED``. uint8, shape:
            ``(n,)``.
        rows (np.ndarray): A number of the row that each pair comes from. int64,
            shape: ``(n,)``.
        places (np.ndarray): For each pair where its row was: a text or a row
            number. Objects, shape: ``(n,)``.
        kind_names (tuple): Each kind's shape and format.
        values (dict): Those of ``VALUES`` that some row has. float32, shape:
            ``(n,)``, of ``places`` ``(n, 2)``.
        group (int): So many pairs, one after the other, belong together.

    Example:
        >>> builder = ColumnsBuilder(max_length=3)
        >>> builder.add(7, TokenPair([1, 2], [3, 4], [5], [], "text", "text"))
        >>> columns = builder.finish()
        >>> columns.pair(0)
        (array([1, 2], dtype=int32), array([3], dtype=int32), array([5], dtype=int32),
         (2, 3, 3))
        >>> columns.places.tolist(), columns.flags.tolist(), columns.count_kinds()
        ([7], [1], Counter({('text', 'text'): 1}))
        >>> twice = TokenColumns.concatenate([columns, columns])
        >>> len(twice), len(twice.select([1])), twice.count_rows()
        (2, 1, 2)
        >>> twice.regroup(2).pair(1)[0].tolist(), twice.regroup(2).group
        ([1, 2], 2)
        >>> builder = ColumnsBuilder(max_length=3)
        >>> builder.add(0, TokenPair([1], [2], [], [], "labelled", "text"))
        >>> builder.add(1, TokenPair([3], [4], [], [], "labelled", "text"))
        >>> other = builder.finish().mismatch(max_length=3).by_turns()
        >>> [other.pair(i)[2].tolist() for i in range(2)]
        [[4], [2]]
    """

    ids: np.ndarray
    starts: np.ndarray
    others: np.ndarray
    kept: np.ndarray
    lengths: np.ndarray
    largest: np.ndarray
    kinds: np.ndarray
    flags: np.ndarray
    rows: np.ndarray
    places: np.ndarray
    kind_names: tuple[tuple[str, str], ...]
    values: dict[str, np.ndarray]
    group: int = 1

    def __len__(self) -> int:
        return len(self.starts)

    def pair(
        self, index: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int, int]]:
        """
        Give one pair.

        Args:
            index (int): The pair's index.

        Returns:
            tuple: The ids of the prompt, of the chosen and of the rejected answer,
            and the pair's ``lengths``.
        """
        prompt, chosen, rejected = self.lengths[index].tolist()
        start, other = int(self.starts[index]), int(self.others[index])
        ids = self.ids[start : start + chosen]
        answer = self.ids[other : other + rejected - prompt]
        return ids[:prompt], ids[prompt:], answer, (prompt, chosen, rejected)

    def count_rows(self) -> int:
        """
        Count the rows that the pairs come from.

        Returns:
            int: The number of rows.
        """
        return len(np.unique(self.rows))

    def count_kinds(self) -> Counter:
        """
        Count the pairs of each shape and format.

        Returns:
            Counter: The pairs by shape and format, in order of first appearance.
        """
        kinds, first, counts = np.unique(
            self.kinds, return_index=True, return_counts=True
        )
        return Counter(
            {self.kind_names[kinds[i]]: int(counts[i]) for i in np.argsort(first)}
        )

    def select(self, indices: Iterable[int]) -> "TokenColumns":
        """
        Take some of the pairs. Their ids are shared, not copied.

        Args:
            indices (Iterable): Indices of pairs.

        Returns:
            TokenColumns: The pairs.
        """
        chosen = np.fromiter(indices, dtype=np.int64)
        arrays = {name: getattr(self, name)[chosen] for name in OF_PAIRS}
        values = {name: array[chosen] for name, array in self.values.items()}
        return replace(self, **arrays, values=values)

    def regroup(self, group: int, counts: Any = None) -> "TokenColumns":
        """
        Make all groups of pairs as large: with copies that count nowhere.

        Args:
            group (int): Pairs of a group, at least as many as any has.
            counts (array, optional): Pairs that each group has. Default: ``group``
                of these columns.

        Returns:
            TokenColumns: The groups, each with copies of its first pair behind it,
            whose ``places`` are -1 and whose weights 0: a group counts as much
            as a larger one.
        """
        if counts is None and group == self.group:
            return self
        if counts is None:
            counts = np.full(len(self) // self.group, self.group)
        counts = np.asarray(counts, np.int64)[:, None]
        firsts, steps = np.cumsum(counts)[:, None] - counts, np.arange(group)
        is_copy = (steps >= counts).reshape(-1)
        result = self.select(np.where(steps < counts, firsts + steps, firsts).flat)
        result.flags[is_copy] = 0
        if "places" in result.values:
            result.values["places"][is_copy] = -1
        if is_copy.any():
            ones = np.ones(len(result), np.float32)
            shares = np.broadcast_to(group / counts, (len(counts), group)).reshape(-1)
            weights = result.values.get("weights", ones) * np.where(is_copy, 0, shares)
            result.values["weights"] = weights.astype(np.float32)
        return replace(result, group=group)

    def by_turns(self) -> "TokenColumns":
        """
        Order the pairs: the first of every row, then the second of every row.

        Returns:
            TokenColumns: All pairs.
        """
        _, firsts, row = np.unique(self.rows, return_index=True, return_inverse=True)
        turns = np.arange(len(self)) - firsts[row.reshape(-1)]
        return self.select(np.argsort(turns, kind="stable").tolist())

    def mismatch(self, max_length: int) -> "TokenColumns":
        """
        Give each prompt the answer to another one as its rejected answer.

        It is the chosen answer of the last pair before it, in a circle, that has
        another prompt.

        Args:
            max_length (int): The most tokens of prompt and answer.

        Returns:
            TokenColumns: The pairs. No ids are copied.

        Raises:
            ValueError: If there is only one prompt.
        """
        prompts = [self.pair(i)[0].tobytes() for i in range(len(self))]
        last = len(prompts) - 1
        while last > 0 and prompts[last] == prompts[0]:
            last -= 1
        if last <= 0:
            raise ValueError(
                "All rows have the same prompt. KTO compares each answer with that "
                "to another prompt: add rows with other prompts."
            )
        partners = [last]
        for i in range(1, len(prompts)):
            is_same = prompts[i] == prompts[i - 1]
            partners.append(partners[-1] if is_same else i - 1)
        sizes = self.lengths[:, 0]
        lengths = self.lengths.copy()
        lengths[:, 2] = np.minimum(sizes + self.kept[partners], max_length)
        others = (self.starts + sizes)[partners]
        return replace(self, others=others, lengths=lengths)

    @staticmethod
    def concatenate(parts: Sequence["TokenColumns"]) -> "TokenColumns":
        """
        Put the pairs of several columns behind each other.

        Args:
            parts (Sequence): At least one.

        Returns:
            TokenColumns: All pairs; the very same columns if there is one part.
        """
        if len(parts) == 1:
            return parts[0]
        names = tuple(dict.fromkeys(kind for p in parts for kind in p.kind_names))
        group = max(part.group for part in parts)
        parts = [p if p.group == group else p.regroup(group) for p in parts]
        offsets = np.cumsum([0, *(len(p.ids) for p in parts)])
        rows = np.cumsum([0, *(int(p.rows.max(initial=-1)) + 1 for p in parts)])
        moved = [
            replace(
                part,
                starts=part.starts + offset,
                others=part.others + offset,
                rows=part.rows + row,
                kinds=np.array([names.index(k) for k in part.kind_names], np.int32)[
                    part.kinds
                ],
            )
            for part, offset, row in zip(parts, offsets, rows)
        ]
        arrays = {
            name: np.concatenate([getattr(part, name) for part in moved])
            for name in ("ids", *OF_PAIRS)
        }
        values = {
            name: np.concatenate([_values(part, name) for part in moved])
            for name in VALUES
            if any(name in part.values for part in parts)
        }
        return TokenColumns(**arrays, kind_names=names, values=values, group=group)


# The arrays with an entry for each pair.
OF_PAIRS = (
    "starts",
    "others",
    "kept",
    "lengths",
    "largest",
    "kinds",
    "flags",
    "rows",
    "places",
)


def _values(columns: TokenColumns, name: str) -> np.ndarray:
    if name in columns.values:
        return columns.values[name]
    return _filled(name, len(columns))


def _filled(name: str, count: int) -> np.ndarray:
    """The values of pairs whose rows have none."""
    default = np.array(VALUES[name], np.float32)
    return np.tile(default, (count, 1)) if len(default) > 1 else default.repeat(count)


class ColumnsBuilder:
    """
    Collect pairs, cut to a length, and make columns of them.

    Args:
        max_length (int): The most tokens of prompt and answer.
        keep_whole (bool): Keep chosen answers of up to this length, cut or not,
            for other prompts. Default: ``False``.

    Example:
        >>> builder = ColumnsBuilder(max_length=8)
        >>> builder.add("a.jsonl:1", TokenPair([1], [3], [5, 6], [], "text", "text"))
        >>> builder.finish().lengths.tolist()
        [[1, 2, 3]]
    """

    def __init__(self, max_length: int, keep_whole: bool = False):
        self._limit, self._keep_whole = max_length, keep_whole
        # Compact arrays: lists of 100 million integers would fill the memory.
        self._ids, self._lengths = array("i"), array("i")
        self._kinds, self._flags = array("i"), array("B")
        self._kept, self._rows = array("i"), array("q")
        self._places: list[str | int] = []
        self._values: dict[str, dict[int, Any]] = {}
        self._kind_names: dict[tuple[str, str], int] = {}

    def add(
        self,
        place: str | int,
        pair: TokenPair,
        row: int | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Add a pair. Both sequences keep their start where they are too long.

        Args:
            place (str or int): Where the pair's row is.
            pair (TokenPair): The pair, its prompt shorter than the length.
            row (int, optional): A number of the row. Default: one of its own.
            values (Mapping, optional): Some of ``VALUES``.
        """
        number = len(self._places)
        self._rows.append(number if row is None else row)
        for name, value in (values or {}).items():
            self._values.setdefault(name, {})[number] = value
        size = len(pair.prompt)
        room = self._limit - size
        chosen, rejected = pair.chosen[:room], pair.rejected[:room]
        flags = PARTED if pair.dropped else 0
        if max(len(pair.chosen), len(pair.rejected)) > room:
            flags |= CUT | (EQUAL if chosen == rejected else 0)
        kept = pair.chosen[: self._limit] if self._keep_whole else chosen
        self._kept.append(len(kept))
        for ids in (pair.prompt, kept, rejected):
            self._ids.extend(ids)
        self._lengths.extend((size, size + len(chosen), size + len(rejected)))
        self._flags.append(flags)
        kind = (pair.shape, pair.format)
        self._kinds.append(self._kind_names.setdefault(kind, len(self._kind_names)))
        self._places.append(place)

    def finish(self) -> TokenColumns:
        """
        Make the columns.

        Returns:
            TokenColumns: The pairs in the order in which they came.
        """
        ids = np.frombuffer(self._ids, np.int32)
        lengths = np.frombuffer(self._lengths, np.int32).reshape(-1, 3)
        kept = np.frombuffer(self._kept, np.int32)
        # The rejected answer's length counts the prompt, which is there once.
        sizes = lengths[:, 2].astype(np.int64) + kept
        starts = np.cumsum(sizes) - sizes
        values = {name: _filled(name, len(starts)) for name in VALUES}
        for name, known in self._values.items():
            values[name][list(known)] = list(known.values())
        places = np.empty(len(starts), dtype=object)
        places[:] = self._places
        return TokenColumns(
            ids=ids,
            starts=starts,
            others=starts + lengths[:, 0] + kept,
            kept=kept,
            lengths=lengths,
            largest=np.maximum.reduceat(ids, starts) if len(starts) else ids,
            kinds=np.frombuffer(self._kinds, np.int32),
            flags=np.frombuffer(self._flags, np.uint8),
            rows=np.frombuffer(self._rows, np.int64),
            places=places,
            kind_names=tuple(self._kind_names),
            values={name: values[name] for name in VALUES if name in self._values},
        )
