# Copyright © 2026 MLX Contributors

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..cli_ui import rprint
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
from .atomic_files import user_cache_folder
from .objective import objective_of
from .preference_dataset import PreferenceDataset
from .preference_files import Splits, open_local_splits
from .preference_hub import open_hub_splits

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
        ValueError: If data that the run needs is missing or can't be used.

    Example:
        >>> import types
        >>> args = types.SimpleNamespace(data="no/such/folder", train=True, test=False)
        >>> load_preference_dataset(args, None)
        Traceback (most recent call last):
        ...
        ValueError: Found no data at no/such/folder.
    """
    fraction = _option(args, {}, "valid_fraction", 0.02)
    if not 0 <= fraction < 1:
        raise ValueError(f"valid_fraction must be at least 0 and below 1: {fraction}.")
    sources = _open_sources(args)
    required = [name for name in ("train", "test") if getattr(args, name, False)]
    for name in required:
        if not any(name in splits for _, splits in sources):
            raise ValueError(
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
            raise ValueError(f"hf_dataset needs a path, got {dataset!r}.")
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
    raise ValueError(
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
