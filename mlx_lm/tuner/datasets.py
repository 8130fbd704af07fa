# Copyright © 2026 MLX Contributors

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..cli_ui import rprint
from ..preference.data.cache import TokenCache
from ..preference.data.rankings import check_criteria
from ..preference.data.sources import Splits, open_hub_splits, open_local_splits
from ..preference.data.table import (
    CUT,
    EQUAL,
    MAX_VALID_PAIRS,
    PARTED,
    TokenColumns,
    choose_held_out,
)
from ..preference.data.tokenize import (
    RowNotes,
    check_row_options,
    counted,
    tokenize_rows,
)
from ..preference.data.tokenizer import PairTokenizer, show_pair
from ..preference.errors import InputError
from ..preference.files import user_cache_folder
from ..preference.objective.objective import objective_of
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
    types,
)


class PreferenceDataset:
    """
    Preference pairs as token ids: a prompt, a chosen and a rejected answer each.

    Sequences longer than ``max_length`` keep their start. Rows that can't be used
    are skipped and counted by reason. :mod:`.preference_rows` lists the shapes, and
    :mod:`.labelled_rows` those of rows that are not one pair.

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
        token_cache (str or Path, optional): A folder that keeps the token ids of
            more than 2,000 rows, see :mod:`.token_cache`. Default: none.
        kind (str): ``"pairs"``; ``"rankings"``, every row ``group_size`` pairs with
            their places; or ``"labels"``, every pair an answer with a label and, as
            the rejected one, the answer to another prompt. Default: ``"pairs"``.
        weight_feature (str, optional): Column of a weight, above 0. Rows with a
            weight of 0 are left out.
        margin_feature (str, optional): Column of a margin in nats.
        criteria (dict, optional): Weights of the criteria to compare answers by.

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
        >>> dataset.pair_lengths().tolist()
        [[2, 3, 3], [2, 3, 3]]
        >>> dataset.shape, dataset.format
        ('text', 'text')
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
        >>> len(ranked.regroup(3))
        3
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
        token_cache: str | Path | None = None,
        kind: str = "pairs",
        weight_feature: str | None = None,
        margin_feature: str | None = None,
        criteria: Mapping[str, float] | None = None,
    ):
        check_criteria(criteria)
        encode = PairTokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.kind = kind
        self.source = source or "preference data"
        self._warn_raw = encode.has_chat_template
        options = {
            "prompt_feature": prompt_feature,
            "chosen_feature": chosen_feature,
            "rejected_feature": rejected_feature,
            "turns": transcripts == "turns" and encode.has_chat_template,
            "wrap_text": wrap_text,
            "kind": kind,
            "weight_feature": weight_feature,
            "margin_feature": margin_feature,
            "criteria": dict(criteria) if criteria else None,
        }
        check_row_options(encode, max_length, options, transcripts, max_bad_rows)
        self._read(data, encode, options, token_cache)
        self.notes.check_criteria(self.source, criteria or ())
        self.notes.check(self.source, len(self), max_length, max_bad_rows)
        self._pair_up()

    def _read(
        self,
        data: Sequence[Any],
        encode: PairTokenizer,
        options: dict[str, Any],
        token_cache: str | Path | None,
    ) -> None:
        """Tokenize the rows, or take what the cache has of them."""
        cache = found = None
        if token_cache:
            settings = {**options, "max_length": self.max_length}
            cache = TokenCache(token_cache, self.tokenizer, settings)
            found = cache.load(data)
        columns, notes = found or tokenize_rows(data, encode, self.max_length, options)
        if cache and not found:
            cache.save(data, columns, notes)
        self._columns: TokenColumns = columns
        self.notes = RowNotes(**notes)

    def __len__(self) -> int:
        return len(self._columns)

    def __getitem__(
        self, index: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int, int]]:
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
        Give the lengths of all pairs.

        Returns:
            np.ndarray: Tokens of the prompt, of prompt and chosen answer, and of
            prompt and rejected answer. Not to be changed. int32, shape: ``(n, 3)``.
        """
        return self._columns.lengths

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
        """Numbers of the pairs, those of ``token_columns.VALUES`` that are in use."""
        return self._columns.values

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
        """
        Find the largest token id, which the model's vocabulary must hold.

        Returns:
            int: The id.
        """
        return int(self._columns.largest.max())

    @property
    def shape(self) -> str:
        """The commonest shape, as :mod:`.preference_rows` names it."""
        return self._commonest(0)

    @property
    def format(self) -> str:
        """The commonest format: "chat", "text" or "wrapped text"."""
        return self._commonest(1)

    def select(
        self, indices: Iterable[int], source: str | None = None
    ) -> "PreferenceDataset":
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
        size = self.group_size
        if len(chosen) % size or (np.diff(chosen.reshape(-1, size)) != 1).any():
            raise InputError(f"Select all {size} pairs of a ranking, in their order.")
        if (chosen[::size] % size).any():
            raise InputError(f"Select rankings from their first of {size} pairs on.")
        result = copy.copy(self)
        result._columns = self._columns.select(chosen)
        result.notes = self.notes.of_part(result._columns.count_rows())
        result.source = source or self.source
        result._pair_up()
        return result

    def regroup(self, group_size: int) -> "PreferenceDataset":
        """
        Make all rankings as long as those of another dataset.

        Args:
            group_size (int): Pairs for each ranking, at least as many as now.

        Returns:
            PreferenceDataset: The pairs, with copies that count nowhere.
        """
        result = copy.copy(self)
        result._columns = self._columns.regroup(group_size)
        return result

    def hold_out(
        self, fraction: float, seed: int = 0
    ) -> tuple["PreferenceDataset", "PreferenceDataset | list"]:
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
        size = min(MAX_VALID_PAIRS, max(1, round(fraction * len(self))))
        if not fraction or len(self) <= size:
            return self, []
        prompts = [self[i][0].tobytes() for i in range(len(self))]
        rows = self._columns.rows.tolist()
        held = choose_held_out(prompts, rows, size, seed, self.kind == "labels")
        if not held:
            return self, []
        valid = self.select(held, f"{self.source} (held out)")
        train = self.select(sorted(set(range(len(self))) - set(held)))
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
        """
        Describe the rows: how many, of what shape, skipped, cut.

        Returns:
            list: Notices of one line each. What needs care starts with [WARNING].
        """
        kinds = self._columns.count_kinds()
        kinds_text = "; ".join(
            f"{'' if len(kinds) == 1 else f'{n:,} of '}{shape}, {format}"
            for (shape, format), n in kinds.most_common()
        )
        noun = "answer" if self.kind == "labels" else "pair"
        counts = f"{counted(len(self), noun)} of {counted(self.num_rows, 'row')}"
        lines = [f"{self.source}: {counts} ({kinds_text}).", *self.notes.lines()]
        flags = self._columns.flags
        cut, equal, parted = (
            int(np.count_nonzero(flags & flag)) for flag in (CUT, EQUAL, PARTED)
        )
        if cut:
            lines.append(f"Cut to {self.max_length:,} tokens: {counted(cut, noun)}.")
        if equal:
            lines.append(
                f"[WARNING] {counted(equal, 'pair')} have equal answers after the cut and teach "
                "nothing: raise max_seq_length."
            )
        if parted:
            tail = self.tokenizer.decode(self.notes.dropped_tail)
            lines.append(
                f"In {counted(parted, noun)} the prompt alone ends in other tokens than "
                f"before an answer, the answer starts where they part: {tail[-60:]!r}."
            )
        if self._warn_raw and any(format == "text" for _, format in kinds):
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
        answers = {"chosen": chosen, "rejected": rejected}
        if self.kind == "labels":
            label = "desired" if self.values["labels"][0] else "not desired"
            answers = {label: chosen}
        return show_pair(self.tokenizer, prompt, answers)

    def _pair_up(self) -> None:
        if self.kind != "labels" or not len(self):
            return
        try:
            self._columns = self._columns.mismatch(self.max_length)
        except ValueError as e:
            raise InputError(f"{self.source}: {e}") from e

    def _commonest(self, part: int) -> str:
        counts: Counter[str] = Counter()
        for kind, count in self._columns.count_kinds().items():
            counts[kind[part]] += count
        return counts.most_common(1)[0][0]


_SPLIT_FILES = {"train": "train", "valid": "validation", "test": "test"}


def load_preference_dataset(args: Any, tokenizer: Any) -> tuple:
    """
    Load preference data as ``mlx_lm.lora`` loads its data.

    Args:
        args (Any): The run's arguments. Needed: ``train`` and ``test`` (bool), and
            ``data`` (a folder, a file or a Hugging Face dataset) or ``hf_dataset``
            (a dict, or a list of dicts, with ``path``). Optional: ``data_dir``,
            ``seed``, ``max_seq_length``, ``valid_fraction``, ``max_bad_rows``,
            ``wrap_text``, ``transcripts``, ``token_cache`` (a folder that keeps
            token ids, the user's cache folder by default, or ``False``),
            ``*_feature``, ``criteria``, and the settings of an ``Objective``, which
            decides the ``kind`` of :class:`PreferenceDataset`. All but these and
            ``seed``, ``max_seq_length``, ``token_cache`` and ``valid_fraction`` also
            in ``hf_dataset``.
        tokenizer (TokenizerWrapper or PreTrainedTokenizerBase): The tokenizer.

    Returns:
        tuple: Train, valid and test set, each a :class:`PreferenceDataset`, or an
        empty list where it isn't needed or isn't there.

    Raises:
        mlx_lm.preference.errors.InputError: If data that the run needs is missing or can't be used.

    Example:
        >>> import types
        >>> args = types.SimpleNamespace(data="no/such/folder", train=True, test=False)
        >>> load_preference_dataset(args, None)
        Traceback (most recent call last):
        ...
        mlx_lm.preference.errors.InputError: Found no data at no/such/folder.
    """
    fraction = _option(args, {}, "valid_fraction", 0.02)
    if not 0 <= fraction < 1:
        raise InputError(f"valid_fraction must be at least 0 and below 1: {fraction}.")
    sources = _open_sources(args)
    required = [name for name in ("train", "test") if getattr(args, name, False)]
    for name in required:
        if not any(name in splits for _, splits in sources):
            raise InputError(
                f"Found no {_SPLIT_FILES[name]} set in {_source_names(args)}, but "
                f"{name}: true needs one."
            )
    if getattr(args, "inspect", None) and "test" not in required:
        required.append(_inspected_split(args, sources))
    if "train" in required:
        required.append("valid")
    results: dict[str, list] = {"train": [], "valid": [], "test": []}
    for given, splits in sources:
        sets = {
            name: _make_dataset(splits[name](), tokenizer, args, given, name)
            for name in required
            if name in splits
        }
        if "train" in sets and "valid" not in sets:
            _hold_out(sets, fraction, getattr(args, "seed", 0) or 0)
        for name, dataset in sets.items():
            results[name].append(dataset)
    # A batch size that one of them can take, all can.
    sizes = [part.group_size for parts in results.values() for part in parts]
    group = max(sizes, default=1)
    return tuple(
        PreferenceDataset.concatenate(parts).regroup(group) if parts else []
        for parts in results.values()
    )


def _open_sources(args: Any) -> list[tuple[Mapping[str, Any], Splits]]:
    """For each dataset its own options and its splits."""
    given = getattr(args, "hf_dataset", None)
    if not given:
        return [({}, _open_data(args))]
    sources = []
    for dataset in [given] if isinstance(given, Mapping) else given:
        if not isinstance(dataset, Mapping) or not dataset.get("path"):
            raise InputError(f"hf_dataset needs a path, got {dataset!r}.")
        rprint(f"Loading Hugging Face dataset {dataset['path']}.")
        splits = {name: dataset.get(f"{name}_split") for name in _SPLIT_FILES}
        config = dict(dataset.get("config") or {})
        data_dir = dataset.get("data_dir")
        if data_dir:
            config["data_dir"] = data_dir
        sources.append((dataset, open_hub_splits(dataset["path"], config, splits)))
    return sources


def _open_data(args: Any) -> Splits:
    data, data_dir = str(args.data), getattr(args, "data_dir", None)
    is_path = data.startswith(("/", "./", "../", "~")) or data.count("/") > 1
    if is_path or Path(data).exists():
        return open_local_splits(data, data_dir)
    rprint(f"Loading Hugging Face dataset {data}.")
    return open_hub_splits(data, {"data_dir": data_dir} if data_dir else {})


def _inspected_split(args: Any, sources: list[tuple[Mapping[str, Any], Splits]]) -> str:
    """The test split if there is one, else that of validation."""
    for name in ("test", "valid"):
        if any(name in splits for _, splits in sources):
            return name
    if getattr(args, "train", False):
        return "valid"
    raise InputError(
        f"Found no test or validation set in {_source_names(args)}, but inspect needs "
        "one."
    )


def _source_names(args: Any) -> str:
    given = getattr(args, "hf_dataset", None)
    if not given:
        return str(args.data)
    return ", ".join(
        d["path"] for d in ([given] if isinstance(given, Mapping) else given)
    )


def _option(args: Any, given: Mapping[str, Any], name: str, default: Any) -> Any:
    """A dataset's own option, else the run's, else the default."""
    for value in (given.get(name), getattr(args, name, None)):
        if value is not None:
            return value
    return default


def _make_dataset(
    rows: Sequence[Any], tokenizer: Any, args: Any, given: Mapping, split: str
) -> PreferenceDataset:
    defaults = {
        "prompt_feature": "prompt",
        "chosen_feature": "chosen",
        "rejected_feature": "rejected",
        "wrap_text": False,
        "transcripts": "turns",
        "max_bad_rows": 0.1,
        "weight_feature": None,
        "margin_feature": None,
        "criteria": None,
    }
    options = {k: _option(args, given, k, v) for k, v in defaults.items()}
    options["kind"] = objective_of(args).data
    name = f"{given.get('path', _option(args, {}, 'data', ''))} ({_SPLIT_FILES[split]})"
    max_length = _option(args, {}, "max_seq_length", 2048)
    cache = _option(args, {}, "token_cache", True)
    if cache is True:
        cache = user_cache_folder("tokens")
    return PreferenceDataset(
        rows, tokenizer, max_length, **options, source=name, token_cache=cache
    )


def _hold_out(sets: dict, fraction: float, seed: int) -> None:
    total = len(sets["train"])
    sets["train"], valid = sets["train"].hold_out(fraction, seed)
    if not valid:
        rprint("[WARNING] There is no validation set: the run has no validation loss.")
        return
    sets["valid"] = valid
    rprint(
        f"No validation set: held out {len(valid):,} of {total:,} training pairs "
        f"(valid_fraction {fraction:g}, seed {seed})."
    )
