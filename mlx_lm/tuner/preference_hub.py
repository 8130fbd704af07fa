# Copyright © 2026 MLX Contributors

"""Raw preference rows from the Hugging Face Hub."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from ..cli_ui import rprint
from .preference_files import SPLIT_ALIASES, LocatedRows, Splits, pick_splits


def open_hub_splits(
    name: str,
    config: Mapping[str, Any] | None = None,
    splits: Mapping[str, str | None] | None = None,
) -> Splits:
    """
    Find the splits of a dataset on the Hugging Face Hub.

    Args:
        name (str): The dataset, in any letter case.
        config (Mapping, optional): Arguments for ``datasets.load_dataset``, such
            as ``name`` and ``data_dir``.
        splits (Mapping, optional): Splits to take as they are named, for example
            ``{"train": "train[:80%]"}``. If train is not among them, those that
            are missing are found by their names.

    Returns:
        dict: For each split a function that gives its rows.

    Raises:
        ValueError: If the dataset can't be loaded, in one line.

    Example:
        >>> open_hub_splits("prefs", splits={"valid": "train[-10%:]"})
        Traceback (most recent call last):
        ...
        ValueError: prefs: give train_split beside valid_split, they may overlap.
    """
    specs = {k: v for k, v in (splits or {}).items() if v}
    config = dict(config or {})
    named: Splits = {
        split: partial(_load_split, name, spec, config) for split, spec in specs.items()
    }
    if "train" in specs:
        return named
    for split, spec in specs.items():
        if re.split(r"[\[+]", spec)[0] in SPLIT_ALIASES["train"]:
            raise ValueError(
                f"{name}: give train_split beside {split}_split, they may overlap."
            )
    loaded = _load_hub(name, config)
    picked = pick_splits(loaded.keys())
    if not picked and len(loaded) == 1:
        picked = {"train": next(iter(loaded))}
    if not picked:
        raise ValueError(
            f"{name} has no split that is known by its name, only "
            f"{', '.join(loaded)}: name them by train_split in hf_dataset."
        )
    found = {
        split: partial(LocatedRows, loaded[its_name], f"{name}[{its_name}]")
        for split, its_name in picked.items()
    }
    return {**found, **named}


def _load_split(name: str, split: str, config: Mapping[str, Any]) -> LocatedRows:
    rows = _load_hub(name, {**config, "split": split})
    return LocatedRows(rows, f"{name}[{split}]")


def _load_hub(name: str, kwargs: Mapping[str, Any]) -> Any:
    try:
        from datasets import exceptions, load_dataset
    except ImportError as e:
        raise ValueError(
            f"{name} needs Hugging Face datasets: pip install 'mlx-lm[train]'"
        ) from e
    try:
        try:
            return load_dataset(name, **kwargs)
        except exceptions.DatasetNotFoundError:
            found = find_hub_name(name)
            if found is None:
                raise
            rprint(f"Loading {found}, the dataset's name on the Hugging Face Hub.")
            return load_dataset(found, **kwargs)
    except exceptions.DatasetNotFoundError as e:
        raise ValueError(
            f"Found no data at {name}: no such file or folder, and no dataset of "
            "that name on the Hugging Face Hub (or it is private)."
        ) from e
    except (exceptions.DatasetsError, OSError, ValueError) as e:
        raise ValueError(f"Can't load {name}: {' '.join(str(e).split())}") from e


def find_hub_name(name: str) -> str | None:
    """
    Look for a dataset on the Hugging Face Hub in any letter case.

    Args:
        name (str): The name, such as "anthropic/hh-rlhf".

    Returns:
        str or None: The name as the Hub spells it, where it differs, else None.

    Example:
        >>> find_hub_name("")
    """
    if not name:
        return None
    from huggingface_hub import HfApi

    for query in dict.fromkeys((name, name.split("/")[-1])):
        for info in HfApi().list_datasets(search=query, limit=500):
            if info.id.lower() == name.lower() and info.id != name:
                return info.id
    return None
