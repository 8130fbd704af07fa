# Copyright © 2026 MLX Contributors

"""Preference rows made into token ids, in a few compact NumPy arrays."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .preference_messages import RowFault
from .preference_rows import PreferenceRow, read_row
from .preference_tokens import PairTokenizer, TokenPair

TOO_LONG = "prompt fills max_length"
_CHUNK = 512

# Bits of a pair's flags: cut to the longest length, with answers that are equal
# after the cut, and with a prompt that ends in other tokens on its own.
CUT, EQUAL, PARTED = 1, 2, 4


@dataclass(frozen=True, eq=False)
class TokenColumns:
    """
    Tokenized pairs, an array for each property.

    Args:
        ids (np.ndarray): The token ids of all pairs: prompt, chosen answer,
            rejected answer. int32, shape: ``(tokens,)``.
        starts (np.ndarray): Where each pair starts in ``ids``. int64, shape:
            ``(n,)``.
        lengths (np.ndarray): Tokens of the prompt, and of the prompt with the
            chosen and with the rejected answer. int32, shape: ``(n, 3)``.
        largest (np.ndarray): The largest id of each pair. int32, shape: ``(n,)``.
        kinds (np.ndarray): Index into ``kind_names``. int32, shape: ``(n,)``.
        flags (np.ndarray): Bits ``CUT``, ``EQUAL`` and ``PARTED``. uint8, shape:
            ``(n,)``.
        places (np.ndarray): For each pair where its row was: a text or a row
            number. Objects, shape: ``(n,)``.
        kind_names (tuple): Each kind's shape and format.

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
        >>> len(twice), len(twice.select([1]))
        (2, 1)
    """

    ids: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    largest: np.ndarray
    kinds: np.ndarray
    flags: np.ndarray
    places: np.ndarray
    kind_names: tuple[tuple[str, str], ...]

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
        start = int(self.starts[index])
        ids = self.ids[start : start + chosen + rejected - prompt]
        lengths = (prompt, chosen, rejected)
        return ids[:prompt], ids[prompt:chosen], ids[chosen:], lengths

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
        names = ("starts", "lengths", "largest", "kinds", "flags", "places")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})

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
        offsets = np.cumsum([0, *(len(p.ids) for p in parts)])
        moved = [
            replace(
                part,
                starts=part.starts + offset,
                kinds=np.array([names.index(k) for k in part.kind_names], np.int32)[
                    part.kinds
                ],
            )
            for part, offset in zip(parts, offsets)
        ]
        arrays = {
            name: np.concatenate([getattr(part, name) for part in moved])
            for name in TokenColumns.__annotations__
            if name != "kind_names"
        }
        return TokenColumns(**arrays, kind_names=names)


class ColumnsBuilder:
    """
    Collect pairs, cut to a length, and make columns of them.

    Args:
        max_length (int): The most tokens of prompt and answer.

    Example:
        >>> builder = ColumnsBuilder(max_length=8)
        >>> builder.add("a.jsonl:1", TokenPair([1], [3], [5, 6], [], "text", "text"))
        >>> builder.finish().lengths.tolist()
        [[1, 2, 3]]
    """

    def __init__(self, max_length: int):
        self._limit = max_length
        # Compact arrays: lists of 100 million integers would fill the memory.
        self._ids, self._lengths = array("i"), array("i")
        self._kinds, self._flags = array("i"), array("B")
        self._places: list[str | int] = []
        self._kind_names: dict[tuple[str, str], int] = {}

    def add(self, place: str | int, pair: TokenPair) -> None:
        """
        Add a pair. Both sequences keep their start where they are too long.

        Args:
            place (str or int): Where the pair's row is.
            pair (TokenPair): The pair, its prompt shorter than the length.
        """
        size = len(pair.prompt)
        room = self._limit - size
        chosen, rejected = pair.chosen[:room], pair.rejected[:room]
        flags = PARTED if pair.dropped else 0
        if max(len(pair.chosen), len(pair.rejected)) > room:
            flags |= CUT | (EQUAL if chosen == rejected else 0)
        for ids in (pair.prompt, chosen, rejected):
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
        # Each answer's length counts the prompt, which is there once.
        sizes = lengths[:, 1].astype(np.int64) + lengths[:, 2] - lengths[:, 0]
        starts = np.cumsum(sizes) - sizes
        places = np.empty(len(starts), dtype=object)
        places[:] = self._places
        return TokenColumns(
            ids=ids,
            starts=starts,
            lengths=lengths,
            largest=np.maximum.reduceat(ids, starts) if len(starts) else ids,
            kinds=np.frombuffer(self._kinds, np.int32),
            flags=np.frombuffer(self._flags, np.uint8),
            places=places,
            kind_names=tuple(self._kind_names),
        )


def tokenize_rows(
    data: Sequence[Any],
    encode: PairTokenizer,
    max_length: int,
    options: dict[str, Any],
) -> tuple[TokenColumns, dict[str, Any]]:
    """
    Tokenize raw rows of any known shape.

    Args:
        data (Sequence): The rows. A ``location`` method, if there is one, names
            the place of a row.
        encode (PairTokenizer): Makes ids of pairs.
        max_length (int): The most tokens of prompt and answer.
        options (dict): Arguments for :func:`.preference_rows.read_row`.

    Returns:
        tuple: The pairs, and notes on the rows as JSON values: ``num_rows``,
        ``skipped`` (rows by reason), ``first_skipped`` and ``details`` (of the
        first row by reason), and ``dropped_tail`` (the first ids that a prompt
        alone has and a prompt with an answer has not).

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> encode = PairTokenizer(PreTrainedTokenizerFast(tokenizer_object=words))
        >>> rows = [{"prompt": "a", "chosen": " b", "rejected": " a"}, {"prompt": ""}]
        >>> columns, notes = tokenize_rows(rows, encode, 2048, {})
        >>> len(columns), notes["num_rows"], notes["skipped"]
        (1, 2, {'unknown columns': 1})
    """
    builder = ColumnsBuilder(max_length)
    locate = getattr(data, "location", int)
    skipped: dict[str, int] = {}
    first_skipped: dict[str, str | int] = {}
    details: dict[str, str] = {}
    dropped_tail: list[int] = []
    for index, pair in _tokenize(data, encode, options):
        if isinstance(pair, TokenPair) and len(pair.prompt) >= max_length:
            pair = RowFault(TOO_LONG)
        if isinstance(pair, RowFault):
            skipped[pair.reason] = skipped.get(pair.reason, 0) + 1
            first_skipped.setdefault(pair.reason, locate(index))
            details.setdefault(pair.reason, pair.detail)
        else:
            dropped_tail = dropped_tail or pair.dropped
            builder.add(locate(index), pair)
    notes = {
        "num_rows": len(data),
        "skipped": skipped,
        "first_skipped": first_skipped,
        "details": details,
        "dropped_tail": dropped_tail,
    }
    return builder.finish(), notes


def _tokenize(
    data: Sequence[Any], encode: PairTokenizer, options: dict[str, Any]
) -> Iterator[tuple[int, TokenPair | RowFault]]:
    """Each row's index with its ids or its fault, tokenized a chunk at a time."""
    for start in range(0, len(data), _CHUNK):
        rows: list[PreferenceRow | RowFault] = []
        for index in range(start, min(start + _CHUNK, len(data))):
            try:
                rows.append(read_row(data[index], **options))
            except RowFault as fault:
                rows.append(fault)
            except RecursionError:
                rows.append(RowFault("nested too deeply"))
        pairs = iter(encode([row for row in rows if isinstance(row, PreferenceRow)]))
        for index, row in enumerate(rows, start):
            yield index, row if isinstance(row, RowFault) else next(pairs)
