# Copyright © 2026 MLX Contributors

"""Folders that ``save_to_disk`` of Hugging Face datasets wrote."""

import json
from pathlib import Path
from typing import Any

from ..errors import InputError
from .sources import FOLDERS, pick_splits


def _saved_splits(folder: Path) -> dict[str, list[Path]]:
    """The files of what ``save_to_disk`` of Hugging Face datasets wrote."""
    names = _read_index(folder / "dataset_dict.json", "splits")
    if names is None:
        files = _read_index(folder / "state.json", "_data_files")
        return {} if files is None else {"train": _arrow_files(folder, files)}
    picked = pick_splits(names)
    if not picked and len(names) != 1:
        raise InputError(
            f"{folder} has no split that is known by its name, only {', '.join(names)}."
        )
    picked = picked or {"train": names[0]}
    return {
        split: _arrow_files(
            folder / name, _read_index(folder / name / "state.json", "_data_files")
        )
        for split, name in picked.items()
    }


def _arrow_files(folder, files):
    try:
        return [folder / Path(file["filename"]).name for file in files]
    except (TypeError, KeyError) as e:
        raise InputError(
            f"{folder} is no whole dataset: its state.json names no files. Save it "
            "again."
        ) from e


def _read_index(path: Path, key: str) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())[key]
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise InputError(f"{path} is damaged: save the dataset again.") from e


FOLDERS.append(_saved_splits)
