# Copyright © 2026 MLX Contributors

"""Preference rows made into token ids, in a few compact NumPy arrays."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ..errors import InputError
from .tokenizer import TokenPair, plain_ids

# Tokens of a pair's prompt and answers; lengths of the prompt and both sequences.
Pair = tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int, int]]
# Bits of a pair's flags: cut to the longest length, with answers that are equal
# after the cut, with a prompt that ends in other tokens on its own, with one that the
# template writes otherwise before an answer, with special tokens in its texts, and with
# answers that no token ends.
CUT, EQUAL, PARTED, REWRITTEN, SPECIAL, ENDLESS = 1, 2, 4, 8, 16, 32
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
    """Tokenized pairs, an array for each property."""

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

    def pair(self, index: int) -> Pair:
        """Give one pair."""
        prompt, chosen, rejected = self.lengths[index].tolist()
        start, other = int(self.starts[index]), int(self.others[index])
        ids = self.ids[start : start + chosen]
        answer = self.ids[other : other + rejected - prompt]
        return ids[:prompt], ids[prompt:], answer, (prompt, chosen, rejected)

    def id_bytes(self) -> Iterator[tuple[bytes, bytes, bytes]]:
        """The ids of each pair's prompt and answers as bytes, in little-endian order."""
        ids = memoryview(np.ascontiguousarray(self.ids, "<i4")).cast("B")
        # A part at a time: lists of all numbers would be larger than the ids.
        for first in range(0, len(self), 2**16):
            part = slice(first, first + 2**16)
            starts, others = 4 * self.starts[part], 4 * self.others[part]
            prompt, chosen, rejected = 4 * self.lengths[part].astype(np.int64).T
            middles, ends = starts + prompt, others + rejected - prompt
            edges = starts, middles, starts + chosen, others, ends
            for a, b, c, d, e in zip(*(edge.tolist() for edge in edges)):
                yield bytes(ids[a:b]), bytes(ids[b:c]), bytes(ids[d:e])

    def unscored(self) -> np.ndarray:
        """Count the tokens of each answer that are another's turn."""
        before = np.concatenate([[0], np.cumsum(self.ids < 0)])
        prompt, chosen, rejected = self.lengths.T
        ends = self.starts + chosen, self.others + rejected - prompt
        starts = self.starts + prompt, self.others
        return np.stack([before[b] - before[a] for a, b in zip(starts, ends)], axis=-1)

    def count_kinds(self) -> Counter:
        """Count the pairs of each shape and format."""
        counts = Counter(self.kinds.tolist())
        return Counter({self.kind_names[kind]: n for kind, n in counts.items()})

    def commonest(self, part: int) -> str:
        """The commonest shape, or the commonest format."""
        counts: Counter[str] = Counter()
        for kind, count in self.count_kinds().items():
            counts[kind[part]] += count
        return counts.most_common(1)[0][0]

    def check_groups(self, indices: np.ndarray) -> None:
        """Refuse to take apart what belongs together."""
        size = self.group
        if len(indices) % size or (np.diff(indices.reshape(-1, size)) != 1).any():
            raise InputError(f"Select all {size} pairs of a ranking, in their order.")
        if (indices[::size] % size).any():
            raise InputError(f"Select rankings from their first of {size} pairs on.")

    def is_raw(self) -> np.ndarray:
        """Tell which pairs are text outside a chat template."""
        return np.array([form == "text" for _, form in self.kind_names])[self.kinds]

    def select(self, indices: Iterable[int]) -> "TokenColumns":
        """Take some of the pairs. Their ids are shared, not copied."""
        chosen = np.fromiter(indices, dtype=np.int64)
        arrays = {name: getattr(self, name)[chosen] for name in OF_PAIRS}
        values = {name: array[chosen] for name, array in self.values.items()}
        return replace(self, **arrays, values=values)

    def regroup(self, group: int, counts: Any = None) -> "TokenColumns":
        """Make all groups of pairs as large: with copies that count nowhere."""
        if counts is None and group == self.group:
            return self
        # What is together already has its shares.
        shares = 1.0 if counts is None else np.repeat(1 / np.asarray(counts), group)
        if counts is None:
            counts = np.full(len(self) // self.group, self.group)
        counts = np.asarray(counts, np.int64)[:, None]
        firsts, steps = np.cumsum(counts)[:, None] - counts, np.arange(group)
        is_copy = (steps >= counts).reshape(-1)
        result = self.select(np.where(steps < counts, firsts + steps, firsts).flat)
        result.flags[is_copy] = 0
        if "places" in result.values:
            result.values["places"][is_copy] = -1
        ones = np.ones(len(result), np.float32)
        weights = result.values.get("weights", ones) * np.where(is_copy, 0, shares)
        result.values["weights"] = weights.astype(np.float32)
        return replace(result, group=group)

    def by_turns(self) -> "TokenColumns":
        """Order the pairs: the first of every row, then the second of every row."""
        _, firsts, row = np.unique(self.rows, return_index=True, return_inverse=True)
        turns = np.arange(len(self)) - firsts[row.reshape(-1)]
        return self.select(np.argsort(turns, kind="stable").tolist())

    def mismatch(self, max_length: int, source: str = "") -> "TokenColumns":
        """Give each prompt the answer to another one as its rejected answer."""
        prompts = [prompt for prompt, _, _ in self.id_bytes()]
        last = len(prompts) - 1
        while last > 0 and prompts[last] == prompts[0]:
            last -= 1
        if last <= 0:
            raise InputError(
                f"{source}: All rows have the same prompt. KTO compares each answer with "
                "that to another prompt: add rows with other prompts."
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
        """Put the pairs of several columns behind each other."""
        if len(parts) == 1:
            return parts[0]
        names = tuple(dict.fromkeys(kind for p in parts for kind in p.kind_names))
        group = max(part.group for part in parts)
        parts = [part.regroup(group) for part in parts]
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
            name: np.concatenate(
                [p.values.get(name, _filled(name, len(p))) for p in moved]
            )
            for name in VALUES
            if any(name in part.values for part in parts)
        }
        return TokenColumns(**arrays, kind_names=names, values=values, group=group)


# All arrays but the ids have an entry for each pair.
OF_PAIRS = tuple(f.name for f in fields(TokenColumns) if f.type is np.ndarray)[1:]


def _filled(name: str, count: int) -> np.ndarray:
    """The values of pairs whose rows have none."""
    default = np.array(VALUES[name], np.float32)
    return np.tile(default, (count, 1)) if len(default) > 1 else default.repeat(count)


class ColumnsBuilder:
    """Collect pairs, cut to a length, and make columns of them."""

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
        """Add a pair. Both sequences keep their start where they are too long."""
        number = len(self._places)
        self._rows.append(number if row is None else row)
        for name, value in (values or {}).items():
            self._values.setdefault(name, {})[number] = value
        size = len(pair.prompt)
        room = self._limit - size
        chosen, rejected = pair.chosen[:room], pair.rejected[:room]
        flags = PARTED * bool(pair.dropped) | REWRITTEN * pair.rewritten
        flags |= SPECIAL * bool(pair.special) | ENDLESS * pair.endless
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
        """Make the columns."""
        ids = np.frombuffer(self._ids, np.int32)
        lengths = np.frombuffer(self._lengths, np.int32).reshape(-1, 3)
        kept = np.frombuffer(self._kept, np.int32)
        # The rejected answer's length counts the prompt, which is there once.
        sizes = lengths[:, 2].astype(np.int64) + kept
        starts = np.cumsum(sizes) - sizes
        values = {name: _filled(name, len(starts)) for name in VALUES}
        for name, known in self._values.items():
            values[name][list(known)] = list(known.values())
        return TokenColumns(
            ids=ids,
            starts=starts,
            others=starts + lengths[:, 0] + kept,
            kept=kept,
            lengths=lengths,
            largest=np.maximum.reduceat(plain_ids(ids), starts) if len(starts) else ids,
            kinds=np.frombuffer(self._kinds, np.int32),
            flags=np.frombuffer(self._flags, np.uint8),
            rows=np.frombuffer(self._rows, np.int64),
            places=np.array(self._places, dtype=object),
            kind_names=tuple(self._kind_names),
            values={name: values[name] for name in VALUES if name in self._values},
        )


def choose_held_out(
    prompts: Sequence[bytes],
    rows: Sequence[int],
    size: int,
    seed: int = 0,
    two_prompts: bool = False,
) -> list[int]:
    """Choose pairs at random: whole rows, and whole prompts if that is possible."""
    pairs: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        pairs.setdefault(row, []).append(i)
    ordered = list(pairs.values())
    # RandomState keeps its numbers across NumPy versions.
    by_row = [ordered[i] for i in np.random.RandomState(seed).permutation(len(pairs))]
    groups: dict[bytes, list[int]] = {}
    for group in by_row:
        name = prompts[group[0]]
        if not name and not two_prompts:
            name = b"row %d" % group[0]
        groups.setdefault(name, []).extend(group)
    if two_prompts:
        # Two prompts remain, whatever the size.
        rest = list(groups.values())[:-2]
        held = _fill(rest, size, 2) if len(rest) >= 2 else set()
    else:
        held = _fill(list(groups.values()), size) or _fill(by_row, size, 1)
    return sorted(held) if len(held) < len(rows) else []


def _fill(groups: list[list[int]], size: int, least: int = 0) -> set[int]:
    """All groups that still fit, and the first ones in any case."""
    held: set[int] = set()
    for number, group in enumerate(groups):
        if number < least or len(held) + len(group) <= size:
            held.update(group)
    return held
