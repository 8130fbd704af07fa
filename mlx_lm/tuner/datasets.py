# Copyright © 2026 MLX Contributors

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..cli_ui import rprint
from ._upstream_datasets import (
    CacheDataset,
    ChatDataset,
    CompletionsDataset,
    ConcatenatedDataset,
    TextDataset,
    create_dataset,
    load_custom_hf_dataset,
    load_dataset,
    load_hf_dataset,
    load_local_dataset,
)
from .preference_files import Splits, open_hub_splits, open_local_splits
from .preference_messages import RowFault
from .preference_rows import KNOWN_SHAPES, TIE, read_row
from .preference_tokens import PairTokenizer, TokenPair

TOO_LONG = "prompt fills max_length"
MAX_VALID_ROWS = 500

# Rows that are left out by rule, not because something is wrong with them.
_NOT_BAD = {TIE, TOO_LONG}

_CHUNK = 512


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
        >>> tokenizer = PreTrainedTokenizerFast(
        ...     tokenizer_object=words, eos_token="</s>"
        ... )
        >>> rows = [{"prompt": "Sky is", "chosen": " blue", "rejected": " red"}]
        >>> prompt, chosen, rejected, lengths = PreferenceDataset(rows, tokenizer)[0]
        >>> prompt.tolist(), chosen.tolist(), rejected.tolist(), lengths
        ([0, 1], [2, 4], [3, 4], (2, 4, 4))
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
        self.max_length = max_length
        self.source = source or "The dataset"
        self.tokenizer = tokenizer
        encode = PairTokenizer(tokenizer)
        _check_options(encode, max_length, wrap_text, transcripts, max_bad_rows)
        self.has_chat_template = encode.has_chat_template
        self.num_rows = len(data)
        self.skipped: Counter[str] = Counter()
        self.first_skipped: dict[str, str | int] = {}
        self._details: dict[str, str] = {}
        self._dropped_tail: list[int] = []
        self._location = getattr(data, "location", None) or _index

        options = {
            "prompt_feature": prompt_feature,
            "chosen_feature": chosen_feature,
            "rejected_feature": rejected_feature,
            "turns": transcripts == "turns" and encode.has_chat_template,
            "wrap_text": wrap_text,
        }
        pairs = []
        for index, row, pair in _tokenize(data, encode, options):
            if isinstance(pair, TokenPair) and len(pair.prompt) >= max_length:
                pair = RowFault(TOO_LONG)
            if isinstance(pair, RowFault):
                self._skip(index, pair)
                continue
            if pair.dropped and not self._dropped_tail:
                self._dropped_tail = pair.dropped
            pairs.append(_PackedPair.pack(index, row, pair, max_length))
        self._pairs = pairs
        self._check_skipped(max_bad_rows)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(
        self, index: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int, int]]:
        pair = self._pairs[index]
        prompt, chosen, _ = pair.lengths
        ids = pair.ids
        return ids[:prompt], ids[prompt:chosen], ids[chosen:], pair.lengths

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
        return self._location(self._pairs[index].row)

    @property
    def shape(self) -> str:
        """The commonest shape of the rows that are used."""
        return Counter(pair.shape for pair in self._pairs).most_common(1)[0][0]

    @property
    def format(self) -> str:
        """The commonest format: "chat", "text" or "wrapped text"."""
        return Counter(pair.format for pair in self._pairs).most_common(1)[0][0]

    def select(self, indices: Iterable[int], source: str | None = None):
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
        Split off a part for validation. No prompt is on both sides.

        Args:
            fraction (float): Share of the pairs, at most 500 and at least one.
            seed (int): Seed of the choice. Default: ``0``.

        Returns:
            tuple: The pairs that remain, and those held out: an empty list if
            ``fraction`` is 0 or there is only one prompt.
        """
        size = min(MAX_VALID_ROWS, max(1, round(fraction * len(self))))
        groups: dict[bytes, list[int]] = {}
        for i, (prompt, *_) in enumerate(self):
            groups.setdefault(prompt.tobytes() or str(i).encode(), []).append(i)
        members = list(groups.values())
        held: list[int] = []
        # RandomState keeps its numbers across NumPy versions.
        for g in np.random.RandomState(seed).permutation(len(members)):
            if len(held) + len(members[g]) <= size:
                held.extend(members[g])
        if not fraction or not held or len(held) == len(self):
            return self, []
        rest = sorted(set(range(len(self))) - set(held))
        train = self.select(rest)
        train.num_rows = self.num_rows - len(held)
        train.skipped, train.first_skipped = self.skipped, self.first_skipped
        return train, self.select(sorted(held), f"{self.source} (held out)")
