# Copyright © 2026 MLX Contributors

"""Data sets of the Hugging Face Hub."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ..errors import InputError
from ..terminal import rprint
from .secrets import hide_values
from .sources import ELSEWHERE, SPLIT_ALIASES, LocatedRows, Splits, pick_splits


def _open_entry(entry: Any) -> tuple[str, Mapping[str, Any], Splits]:
    if not isinstance(entry, Mapping) or not entry.get("path"):
        raise InputError(f"hf_dataset needs a path, got {entry!r}.")
    name = entry["path"]
    rprint(f"Loading Hugging Face dataset {name}.")
    config = dict(entry.get("config") or {})
    for key in ("split", "streaming"):
        if config.get(key):
            raise InputError(
                f"The config of {name} has {key}: leave it out. Splits are named by "
                "train_split and the like, and max_rows reads a part of the rows."
            )
    if entry.get("data_dir"):
        config["data_dir"] = entry["data_dir"]
    splits = {split: entry.get(f"{split}_split") for split in SPLIT_ALIASES}
    return name, entry, open_hub_splits(name, config, splits)


def open_hub_splits(
    name: str,
    config: Mapping[str, Any] | None = None,
    splits: Mapping[str, str | None] | None = None,
) -> Splits:
    """Find the splits of a dataset on the Hugging Face Hub."""
    specs = {k: v for k, v in (splits or {}).items() if v}
    config = dict(config or {})
    named: Splits = {
        split: partial(_load_split, name, spec, config) for split, spec in specs.items()
    }
    if "train" in specs:
        return named
    loaded = _load_hub(name, config)
    picked = pick_splits(loaded.keys())
    if not picked and len(loaded) == 1:
        picked = {"train": next(iter(loaded))}
    if not picked:
        raise InputError(
            f"{name} has no split that is known by its name, only "
            f"{', '.join(loaded)}: name them by train_split in hf_dataset."
        )
    trained = {*SPLIT_ALIASES["train"], picked.get("train")}
    for split, spec in specs.items():
        if trained & {part.partition("[")[0] for part in spec.split("+")}:
            raise InputError(
                f"{name}: give train_split beside {split}_split, they may overlap."
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
        raise InputError(
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
        raise InputError(
            f"Found no data at {name}: no such file or folder, and no dataset of "
            "that name on the Hugging Face Hub (or it is private)."
        ) from e
    except (exceptions.DatasetsError, OSError, ValueError, RuntimeError) as e:
        # What failed while rows were made is the cause alone.
        made = isinstance(e, exceptions.DatasetGenerationError) and e.__cause__
        reason = hide_values(" ".join(str(made or e).split()), kwargs)
        if "Dataset scripts" in reason:
            reason += (
                ". The Hub may have its rows as Parquet: give hf_dataset the config "
                "{revision: refs/convert/parquet}"
            )
        raise InputError(f"Can't load {name}: {reason}") from e


def find_hub_name(name: str) -> str | None:
    """Look for a dataset on the Hugging Face Hub in any letter case."""
    from huggingface_hub import HfApi

    for query in dict.fromkeys((name, name.split("/")[-1])):
        for info in HfApi().list_datasets(search=query, limit=500):
            if info.id.lower() == name.lower() and info.id != name:
                return info.id
    return None


ELSEWHERE.append(_open_entry)
