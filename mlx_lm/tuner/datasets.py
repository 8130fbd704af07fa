# Copyright © 2026 MLX Contributors

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..preference.data.notes import RowNotes, describe
from ..preference.data.options import RowOptions, pair_tokenizer, row_arguments
from ..preference.data.sources import needed_splits, open_sources
from ..preference.data.splits import load_splits
from ..preference.data.table import Pair, TokenColumns, choose_held_out
from ..preference.data.tokenize import kept_or_tokenized
from ..preference.data.tokenizer import show_pair
from ..preference.errors import InputError
from ..preference.files import user_cache_folder
from ._upstream_datasets import (
    CacheDataset,
    ChatDataset,
    CompletionsDataset,
    ConcatenatedDataset,
    Dict,
    List,
    PreTrainedTokenizer,
    TextDataset,
    create_dataset,
    json,
    load_custom_hf_dataset,
    load_dataset,
    load_hf_dataset,
    load_local_dataset,
    rprint,
    types,
)


class PreferenceDataset:
    """
    Preference pairs as token ids: a prompt, a chosen and a rejected answer each.

    Sequences longer than ``max_length`` keep their start. Rows that can't be used
    are skipped and counted by reason. ``DPO_REFERENCE.md`` lists the shapes.

    Args:
        data (Sequence): Raw rows: dicts, or a Hugging Face dataset. A ``location``
            method, if there is one, names the place of a row.
        tokenizer (TokenizerWrapper or PreTrainedTokenizerBase): The tokenizer.
        max_length (int): The most tokens of prompt and answer. Default: ``2048``.
        source (str, optional): A name of the data, for messages.
        token_cache (str or Path, optional): A folder that keeps the token ids of
            more than 2,000 rows. Default: none.
        kind (str): ``"pairs"``; ``"rankings"``, every row ``group_size`` pairs with
            their places; or ``"labels"``, every pair an answer with a label and, as
            the rejected one, the answer to another prompt. Default: ``"pairs"``.
        mismatch (bool): Give labelled answers that one, which losses like ``kto``
            need; ``apo_zero_unpaired`` looks at no other. Default: ``True``.
        options (Any): The fields of :class:`RowOptions`: how rows are read.

    Raises:
        mlx_lm.preference.errors.InputError: If an option is wrong, too many rows are bad, or none is usable.

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
        >>> dataset.pair_lengths().tolist(), dataset.shape, dataset.format
        ([[2, 3, 3], [2, 3, 3]], 'text', 'text')
        >>> [np.frombuffer(x, "<i4").tolist() for x in next(dataset.id_bytes())]
        [[0, 1], [2], [3]]
        >>> dataset.unscored.tolist()
        [[0, 0], [0, 0]]
        >>> train, valid = dataset.hold_out(0.5)
        >>> len(train), len(valid), len(dataset.select([1]))
        (1, 1, 1)
        >>> train.num_rows, train.skipped, train.first_skipped
        (1, Counter(), {})
        >>> dataset.concatenate([train, valid]).summary()[0]
        'preference data, preference data (held out): 2 pairs of 2 rows (text, text).'
        >>> print(dataset.preview())
        prompt   'Sky is'
        chosen   'blue'
        rejected 'red'
        >>> rows = [{"prompt": "Sky is", "ranking": [" blue", " red", " is"]}]
        >>> ranked = PreferenceDataset(rows, tokenizer, kind="rankings")
        >>> ranked.group_size, ranked.values["places"].tolist()
        (2, [[0.0, 1.0], [-1.0, 2.0]])
    """

    def __init__(
        self,
        data: Sequence[Any],
        tokenizer: Any,
        max_length: int = 2048,
        *,
        source: str | None = None,
        token_cache: str | Path | None = None,
        kind: str = "pairs",
        mismatch: bool = True,
        **options: Any,
    ):
        row_options = RowOptions(**options)
        if max_length < 2:
            raise InputError(f"max_length must be at least 2, got {max_length}.")
        encode = pair_tokenizer(row_options, tokenizer)
        self.tokenizer, self.max_length = tokenizer, max_length
        self.kind, self.mismatch = kind, mismatch
        self.source = source or "preference data"
        # Of how many training rows they are, where not all were read.
        self.sample: Any = None
        self._has_chat_template = encode.has_chat_template
        arguments = row_arguments(row_options, encode, kind)
        given = data, encode, max_length, arguments, token_cache
        self._columns, notes = kept_or_tokenized(*given)
        self.notes = RowNotes(**notes)
        self.notes.check_criteria(self.source, row_options.criteria or ())
        self.notes.check(self.source, len(self), max_length, row_options.max_bad_rows)
        self._pair_up()

    def __len__(self) -> int:
        return len(self._columns)

    def __getitem__(self, index: int) -> Pair:
        return self._columns.pair(index)

    def itemlen(self, index: int) -> int:
        """
        Count the tokens of a pair's longer sequence, its prompt included.

        Args:
            index (int): The pair's index.

        Returns:
            int: The number of tokens.
        """
        return int(self._columns.lengths[index].max())

    def pair_lengths(self) -> np.ndarray:
        """
        Give the lengths of all pairs. Not to be changed.

        Returns:
            np.ndarray: Tokens of the prompt, of prompt and chosen answer, and of
            prompt and rejected answer. int32, shape: ``(n, 3)``.
        """
        return self._columns.lengths

    def id_bytes(self) -> Iterator[tuple[bytes, bytes, bytes]]:
        """
        Go over the token ids of all pairs, a few times as fast as pair by pair.

        Yields:
            tuple: The ids of prompt, chosen and rejected answer, each as the bytes of
            little-endian int32 numbers.
        """
        return self._columns.id_bytes()

    @property
    def num_rows(self) -> int:
        """Raw rows, those that were skipped among them."""
        return self.notes.num_rows

    @property
    def skipped(self) -> Counter[str]:
        """How many rows were skipped for each reason."""
        return Counter(self.notes.skipped)

    @property
    def first_skipped(self) -> Mapping[str, str | int]:
        """The place of the first row that was skipped for each reason."""
        return self.notes.first_skipped

    @property
    def values(self) -> dict[str, np.ndarray]:
        """Numbers of the pairs, such as ``weights``, where rows have them."""
        return self._columns.values

    @property
    def unscored(self) -> np.ndarray:
        """How many tokens of each answer are another's turn, and there as ``~token``."""
        return self._columns.unscored()

    @property
    def group_size(self) -> int:
        """So many neighbouring pairs share one ranking; else 1."""
        return self._columns.group

    def source_row(self, index: int) -> str | int:
        """
        Name the raw row that a pair was made of.

        Args:
            index (int): The pair's index.

        Returns:
            str or int: File and line where they are known, else the row's index.
        """
        return self._columns.places[index]

    def largest_token(self) -> int:
        """Find the largest token id, which the model's vocabulary must hold."""
        return int(self._columns.largest.max())

    @property
    def shape(self) -> str:
        """The commonest shape, as ``DPO_REFERENCE.md`` names it."""
        return self._columns.commonest(0)

    @property
    def format(self) -> str:
        """The commonest format: "chat", "text" or "wrapped text"."""
        return self._columns.commonest(1)

    def select(self, indices: Iterable[int], source: str | None = None) -> Self:
        """
        Make a dataset of some of the pairs.

        Args:
            indices (Iterable): Indices of pairs.
            source (str, optional): A name of the new dataset, for messages.

        Returns:
            PreferenceDataset: The pairs. Skipped rows stay with this dataset. Labels
            get their other answers from among these pairs.

        Raises:
            mlx_lm.preference.errors.InputError: If a ranking would be taken apart, or labels have one prompt.
        """
        chosen = np.fromiter(indices, dtype=np.int64)
        self._columns.check_groups(chosen)
        result = copy.copy(self)
        result._columns = self._columns.select(chosen)
        result.notes = self.notes.of_part(len(np.unique(result._columns.rows)))
        result.source = source or self.source
        result._pair_up()
        return result

    def hold_out(self, fraction: float, seed: int = 0) -> tuple[Self, Self | list]:
        """
        Split off a part for validation, whole prompts where that is possible.

        Whole rows always stay together. Labels are held out for two prompts or more,
        since each answer is compared with that to another prompt.

        Args:
            fraction (float): Share of the pairs: at least one, at most 500 pairs.
            seed (int): Seed of the choice. Default: ``0``.

        Returns:
            tuple: The pairs that remain, and those held out: an empty list if
            ``fraction`` is 0 or there are too few rows.
        """
        size = min(500, max(1, round(fraction * len(self))))
        if not fraction or len(self) <= size:
            return self, []
        prompts = [prompt for prompt, _, _ in self.id_bytes()]
        rows = self._columns.rows.tolist()
        held = choose_held_out(prompts, rows, size, seed, self._compares)
        if not held:
            return self, []
        valid = self.select(held, f"{self.source} (held out)")
        train = self.select(np.delete(np.arange(len(self)), held))
        train.notes = replace(self.notes, num_rows=self.num_rows - valid.num_rows)
        return train, valid

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
        result._columns = TokenColumns.concatenate([d._columns for d in datasets])
        result.notes = RowNotes.joined([d.notes for d in datasets])
        result.source = ", ".join(dict.fromkeys(d.source for d in datasets))
        return result

    def summary(self) -> list[str]:
        """Describe the rows, a line each; what needs care starts with [WARNING]."""
        noun = "answer" if self.kind == "labels" else "pair"
        given = self._columns, self.notes, self.source, noun, self.max_length
        return describe(*given, self.tokenizer.decode, self._has_chat_template)

    def preview(self) -> str:
        """Show the first pair: the end of the prompt, both ends of the answers."""
        prompt, chosen, rejected, _ = self[0]
        answers = {"chosen": chosen, "rejected": rejected}
        if self.kind == "labels":
            label = "desired" if self.values["labels"][0] else "not desired"
            answers = {label: chosen}
        return show_pair(self.tokenizer, prompt, answers)

    @property
    def _compares(self) -> bool:
        return self.kind == "labels" and self.mismatch

    def _pair_up(self) -> None:
        if self._compares and len(self):
            self._columns = self._columns.mismatch(self.max_length, self.source)


def load_preference_dataset(
    data: Any,
    tokenizer: Any,
    *,
    train: bool = True,
    test: bool = False,
    inspect: bool = False,
    kind: str = "pairs",
    mismatch: bool = True,
    max_length: int = 2048,
    data_dir: str | None = None,
    valid_fraction: float = 0.02,
    seed: int = 0,
    max_rows: int | None = None,
    enough_rows: int | None = None,
    token_cache: str | Path | bool | None = None,
    **options: Any,
) -> tuple:
    """
    Load preference data as ``mlx_lm.lora`` loads its data.

    Args:
        data (str, Path, dict or list): A folder, a file or a Hugging Face dataset; or
            what ``hf_dataset`` holds: a dict, or a list of dicts, with ``path`` and,
            for this dataset alone, ``config``, ``data_dir``, ``train_split``,
            ``valid_split``, ``test_split`` and any of ``options``.
        tokenizer (TokenizerWrapper or PreTrainedTokenizerBase): The tokenizer.
        train (bool): Load the training and the validation set. Default: ``True``.
        test (bool): Load the test set. Default: ``False``.
        inspect (bool): Load a test set or, where there is none, a validation set.
            Default: ``False``.
        kind (str): As :class:`PreferenceDataset` takes it. Default: ``"pairs"``.
        mismatch (bool): As :class:`PreferenceDataset` takes it. Default: ``True``.
        max_length (int): The most tokens of prompt and answer. Default: ``2048``.
        data_dir (str, optional): Folder inside ``data``.
        valid_fraction (float): Share of the pairs held out, at most 500, if there is
            no validation split. Default: ``0.02``.
        seed (int): Seed of their choice, and of that of ``max_rows``. Default: ``0``.
        max_rows (int, optional): Read at most so many training rows, chosen at random
            from those of all datasets together. Default: all.
        enough_rows (int, optional): What ``max_rows`` is where all of them take more
            than a quarter of the free memory. Default: such data is refused.
        token_cache (str, Path or bool, optional): A folder that keeps token ids, or
            ``False``. Default: one in the user's cache folder.
        options (Any): The fields of :class:`RowOptions`.

    Returns:
        tuple: Train, valid and test set, each a :class:`PreferenceDataset`, or an
        empty list where it isn't needed or isn't there.

    Raises:
        mlx_lm.preference.errors.InputError: If data that is needed is missing or can't
            be used.

    Example:
        >>> load_preference_dataset("no/such/folder", None)
        Traceback (most recent call last):
        ...
        mlx_lm.preference.errors.InputError: Found no data at no/such/folder.
    """
    if not 0 <= valid_fraction < 1:
        raise InputError(
            f"valid_fraction must be at least 0 and below 1: {valid_fraction}."
        )
    row_options = RowOptions(**options)
    if token_cache is None or token_cache is True:
        token_cache = user_cache_folder("tokens")
    sources = open_sources(data, data_dir)
    names = needed_splits(sources, train, test, inspect)
    shared: dict[str, Any] = {"kind": kind, "mismatch": mismatch}
    shared["token_cache"] = token_cache or None

    def make(rows: Any, source: str, own: Mapping[str, Any]) -> PreferenceDataset:
        more = {**shared, **vars(row_options.updated(own))}
        return PreferenceDataset(rows, tokenizer, max_length, source=source, **more)

    given = valid_fraction, seed, max_rows, enough_rows
    results, sample = load_splits(sources, names, make, *given)
    concatenate = PreferenceDataset.concatenate
    found: list[Any] = [p and concatenate(p) for p in results.values()]
    # A batch size that one of them can take, all can.
    group = max((dataset.group_size for dataset in found if dataset), default=1)
    for dataset in filter(None, found):
        dataset._columns = dataset._columns.regroup(group)
    if found[0]:
        found[0].sample = sample
    return tuple(found)
