# Copyright © 2026 MLX Contributors

"""The dataset of preference pairs, tokenized."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .preference_messages import RowFault
from .preference_rows import KNOWN_SHAPES, TIE, PreferenceRow, read_row
from .preference_tokens import PairTokenizer, TokenPair

TOO_LONG = "prompt fills max_length"
# Rows that are left out by rule, not because something is wrong with them.
_NOT_BAD = {TIE, TOO_LONG}
MAX_VALID_PAIRS = 500
_CHUNK = 512


class _PackedPair(NamedTuple):
    ids: np.ndarray
    lengths: tuple[int, int, int]
    place: str | int
    shape: str
    format: str
    is_cut: bool
    is_parted: bool

    @classmethod
    def pack(cls, place: str | int, pair: TokenPair, limit: int) -> "_PackedPair":
        """Cut both sequences to ``limit`` tokens, keeping their start."""
        size = len(pair.prompt)
        chosen, rejected = pair.chosen[: limit - size], pair.rejected[: limit - size]
        lengths = (size, size + len(chosen), size + len(rejected))
        is_cut = size + max(len(pair.chosen), len(pair.rejected)) > limit
        ids = np.array(pair.prompt + chosen + rejected, dtype=np.int32)
        return cls(
            ids, lengths, place, pair.shape, pair.format, is_cut, bool(pair.dropped)
        )

    @property
    def is_equal(self) -> bool:
        prompt, chosen, _ = self.lengths
        return np.array_equal(self.ids[prompt:chosen], self.ids[chosen:])


class PreferenceDataset:
    """
    Preference pairs as token ids: a prompt, a chosen and a rejected answer each.

    Sequences longer than ``max_length`` keep their start. Rows that can't be used
    are skipped and counted by reason. :mod:`.preference_rows` lists the shapes.

    Args:
        data (Sequence): Raw rows: dicts, or a Hugging Face dataset. A ``location``
            method, if there is one, names the place of a row.
        tokenizer (TokenizerWrapper or PreTrainedTokenizerBase): The tokenizer.
        max_length (int): The most tokens of prompt and answer. Default: ``2048``.
        prompt_feature (str): Column of the prompt. Default: ``"prompt"``.
        chosen_feature (str): Column of the preferred answer.
            Default: ``"chosen"``.
        rejected_feature (str): Column of the other answer.
            Default: ``"rejected"``.
        wrap_text (bool): Put raw text into the chat template as a user and an
            assistant turn. Default: ``False``.
        transcripts (str): ``"turns"`` makes turns of transcripts and of questions
            with answers where the tokenizer has a chat template; ``"raw"`` keeps
            them as text. Default: ``"turns"``.
        max_bad_rows (float): The largest share of bad rows. Default: ``0.1``.
        source (str, optional): A name of the data, for messages.

    Raises:
        ValueError: If an option is wrong, too many rows are bad, or none is usable.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> vocab = {"Sky": 0, "is": 1, "blue": 2, "red": 3, "</s>": 4}
        >>> words = Tokenizer(models.WordLevel(vocab, unk_token="</s>"))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
        >>> rows = [{"prompt": "Sky is", "chosen": " blue", "rejected": " red"}]
        >>> dataset = PreferenceDataset(rows * 2, tokenizer)
        >>> prompt, chosen, rejected, lengths = dataset[0]
        >>> prompt.tolist(), chosen.tolist(), rejected.tolist(), lengths
        ([0, 1], [2], [3], (2, 3, 3))
        >>> dataset.itemlen(0), dataset.source_row(1), dataset.largest_token()
        (3, 1, 3)
        >>> dataset.shape, dataset.format
        ('text', 'text')
        >>> train, valid = dataset.hold_out(0.5)
        >>> len(train), len(valid), len(dataset.select([1]))
        (1, 1, 1)
        >>> dataset.concatenate([train, valid]).summary()[0]
        'preference data, preference data (held out): 2 pairs of 2 rows (text, text).'
        >>> print(dataset.preview())
        prompt   'Sky is'
        chosen   'blue'
        rejected 'red'
    """

    def __init__(
        self,
        data: Sequence[Any],
        tokenizer: Any,
        max_length: int = 2048,
        *,
        prompt_feature: str = "prompt",
        chosen_feature: str = "chosen",
        rejected_feature: str = "rejected",
        wrap_text: bool = False,
        transcripts: str = "turns",
        max_bad_rows: float = 0.1,
        source: str | None = None,
    ):
        encode = PairTokenizer(tokenizer)
        _check_options(encode, max_length, wrap_text, transcripts, max_bad_rows)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.source = source or "preference data"
        self.num_rows = len(data)
        self.skipped: Counter[str] = Counter()
        self.first_skipped: dict[str, str | int] = {}
        self._details: dict[str, str] = {}
        self._dropped_tail: list[int] = []
        self._warn_raw = encode.has_chat_template
        self._pairs: list[_PackedPair] = []
        options = {
            "prompt_feature": prompt_feature,
            "chosen_feature": chosen_feature,
            "rejected_feature": rejected_feature,
            "turns": transcripts == "turns" and encode.has_chat_template,
            "wrap_text": wrap_text,
        }
        locate = getattr(data, "location", int)
        for index, pair in _tokenize(data, encode, options):
            self._add(locate(index), pair)
        self._check_skipped(max_bad_rows)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(
        self, index: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int, int]]:
        ids, lengths = self._pairs[index][:2]
        prompt, chosen, _ = lengths
        return ids[:prompt], ids[prompt:chosen], ids[chosen:], lengths

    def itemlen(self, index: int) -> int:
        """
        Count the tokens of a pair's longer sequence, its prompt included.

        Args:
            index (int): The pair's index.

        Returns:
            int: The number of tokens.
        """
        return max(self._pairs[index].lengths)

    def source_row(self, index: int) -> str | int:
        """
        Name the raw row that a pair was made of.

        Args:
            index (int): The pair's index.

        Returns:
            str or int: File and line where they are known, else the row's index.
        """
        return self._pairs[index].place

    def largest_token(self) -> int:
        """
        Find the largest token id, which the model's vocabulary must hold.

        Returns:
            int: The id.
        """
        return max(int(pair.ids.max()) for pair in self._pairs)

    @property
    def shape(self) -> str:
        """The commonest shape, as :mod:`.preference_rows` names it."""
        return self._commonest("shape")

    @property
    def format(self) -> str:
        """The commonest format: "chat", "text" or "wrapped text"."""
        return self._commonest("format")

    def select(
        self, indices: Iterable[int], source: str | None = None
    ) -> "PreferenceDataset":
        """
        Make a dataset of some of the pairs.

        Args:
            indices (Iterable): Indices of pairs.
            source (str, optional): A name of the new dataset, for messages.

        Returns:
            PreferenceDataset: The pairs. Skipped rows stay with this dataset.
        """
        result = copy.copy(self)
        result._pairs = [self._pairs[i] for i in indices]
        result.num_rows = len(result._pairs)
        result.skipped, result.first_skipped = Counter(), {}
        result.source = source or self.source
        return result

    def hold_out(
        self, fraction: float, seed: int = 0
    ) -> tuple["PreferenceDataset", "PreferenceDataset | list"]:
        """
        Split off a part for validation, whole prompts where that is possible.

        Args:
            fraction (float): Share of the pairs: at least one, at most 500 pairs.
            seed (int): Seed of the choice. Default: ``0``.

        Returns:
            tuple: The pairs that remain, and those held out: an empty list if
            ``fraction`` is 0 or there is only one pair.
        """
        size = min(MAX_VALID_PAIRS, max(1, round(fraction * len(self))))
        if not fraction or len(self) <= size:
            return self, []
        # RandomState keeps its numbers across NumPy versions.
        shuffled = np.random.RandomState(seed).permutation(len(self)).tolist()
        groups: dict[bytes, list[int]] = {}
        for i in shuffled:
            prompt = self[i][0].tobytes()
            groups.setdefault(prompt or b"row %d" % i, []).append(i)
        held: set[int] = set()
        for group in groups.values():
            if len(held) + len(group) <= size:
                held.update(group)
        held = held or set(shuffled[:size])
        train = self.select(i for i in range(len(self)) if i not in held)
        train.num_rows = self.num_rows - len(held)
        train.skipped, train.first_skipped = self.skipped, self.first_skipped
        return train, self.select(sorted(held), f"{self.source} (held out)")

    @staticmethod
    def concatenate(datasets: Sequence["PreferenceDataset"]) -> "PreferenceDataset":
        """
        Put datasets of one tokenizer behind each other.

        Args:
            datasets (Sequence): At least one dataset.

        Returns:
            PreferenceDataset: All pairs, with the skipped rows of all.
        """
        result = copy.copy(datasets[0])
        result._pairs = [pair for d in datasets for pair in d._pairs]
        result.num_rows = sum(d.num_rows for d in datasets)
        result.skipped = sum((d.skipped for d in datasets), Counter())
        result.source = ", ".join(dict.fromkeys(d.source for d in datasets))
        tails = (d._dropped_tail for d in datasets if d._dropped_tail)
        result._dropped_tail = next(tails, [])
        for name in ("first_skipped", "_details"):
            firsts = (getattr(d, name) for d in reversed(datasets))
            setattr(result, name, {k: v for first in firsts for k, v in first.items()})
        return result

    def summary(self) -> list[str]:
        """
        Describe the rows: how many, of what shape, skipped, cut.

        Returns:
            list: Notices of one line each. What needs care starts with [WARNING].
        """
        kinds = Counter(f"{pair.shape}, {pair.format}" for pair in self._pairs)
        kinds_text = "; ".join(
            kind if len(kinds) == 1 else f"{n:,} of {kind}"
            for kind, n in kinds.most_common()
        )
        counts = f"{_count(len(self))} of {_count(self.num_rows, 'row')}"
        lines = [f"{self.source}: {counts} ({kinds_text})."]
        for reason, count in self.skipped.most_common():
            level = "" if reason in _NOT_BAD else "[WARNING] "
            lines.append(f"{level}Skipped {self._describe(reason, count)}.")
        cut = [pair for pair in self._pairs if pair.is_cut]
        if cut:
            lines.append(f"Cut to {self.max_length:,} tokens: {_count(len(cut))}.")
        equal = sum(pair.is_equal for pair in cut)
        if equal:
            lines.append(
                f"[WARNING] {_count(equal)} have equal answers after the cut and teach "
                "nothing: raise max_seq_length."
            )
        parted = sum(pair.is_parted for pair in self._pairs)
        if parted:
            tail = self.tokenizer.decode(self._dropped_tail)
            lines.append(
                f"In {_count(parted)} the prompt alone ends in other tokens than "
                f"before an answer, the answer starts where they part: {tail[-60:]!r}."
            )
        if self._warn_raw and any(pair.format == "text" for pair in self._pairs):
            lines.append(
                "[WARNING] Raw text for a model with a chat template: wrap_text: true "
                "makes turns of it."
            )
        return lines

    def preview(self) -> str:
        """
        Show the first pair as the model sees it.

        Returns:
            str: Three lines: the end of the prompt, both ends of the answers.
        """
        prompt, chosen, rejected, _ = self[0]
        decode = lambda ids: repr(self.tokenizer.decode(ids.tolist()))
        lines = [f"prompt   {decode(prompt[-24:])}"]
        for name, ids in (("chosen", chosen), ("rejected", rejected)):
            text = decode(ids)
            if len(ids) > 24:
                text = f"{decode(ids[:16])} … {decode(ids[-8:])}"
            lines.append(f"{name:<8} {text}")
        return "\n".join(lines)

    def _add(self, place: str | int, pair: TokenPair | RowFault) -> None:
        if isinstance(pair, TokenPair) and len(pair.prompt) >= self.max_length:
            pair = RowFault(TOO_LONG)
        if isinstance(pair, RowFault):
            self.skipped[pair.reason] += 1
            self.first_skipped.setdefault(pair.reason, place)
            self._details.setdefault(pair.reason, pair.detail)
            return
        self._dropped_tail = self._dropped_tail or pair.dropped
        self._pairs.append(_PackedPair.pack(place, pair, self.max_length))

    def _commonest(self, name: str) -> str:
        return Counter(getattr(p, name) for p in self._pairs).most_common(1)[0][0]

    def _describe(self, reason: str, count: int) -> str:
        place, detail = self.first_skipped[reason], self._details[reason]
        place = place if isinstance(place, str) else f"row {place}"
        detail = f", {detail}" if detail else ""
        return f"{_count(count, 'row')}: {reason} (first: {place}{detail})"

    def _check_skipped(self, max_bad_rows: float) -> None:
        if not self.num_rows:
            raise ValueError(f"{self.source} has no rows.")
        if not self._pairs:
            worst = self._describe(*self.skipped.most_common(1)[0])
            raise ValueError(
                f"{self.source}: no row of {self.num_rows:,} can be used. Skipped "
                f"{worst}. Known shapes: {'; '.join(KNOWN_SHAPES)}."
            )
        bad = Counter({k: n for k, n in self.skipped.items() if k not in _NOT_BAD})
        if bad.total() > max_bad_rows * self.num_rows:
            worst = self._describe(*bad.most_common(1)[0])
            raise ValueError(
                f"{self.source}: {bad.total():,} of {self.num_rows:,} rows are bad, "
                f"more than max_bad_rows ({max_bad_rows:g}) allows. Most often {worst}."
            )


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
        pairs = iter(encode([row for row in rows if isinstance(row, PreferenceRow)]))
        for index, row in enumerate(rows, start):
            yield index, row if isinstance(row, RowFault) else next(pairs)


def _check_options(
    encode: PairTokenizer,
    max_length: int,
    wrap_text: bool,
    transcripts: str,
    max_bad_rows: float,
) -> None:
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}.")
    if transcripts not in ("turns", "raw"):
        raise ValueError(f"transcripts must be 'turns' or 'raw', got {transcripts!r}.")
    if not 0 <= max_bad_rows <= 1:
        raise ValueError(f"max_bad_rows must be between 0 and 1, got {max_bad_rows}.")
    if wrap_text and not encode.has_chat_template:
        raise ValueError("wrap_text needs a tokenizer with a chat template.")
    if wrap_text and transcripts == "raw":
        raise ValueError("wrap_text: true and transcripts: raw exclude each other.")


def _count(number: int, noun: str = "pair") -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
