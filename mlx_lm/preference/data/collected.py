# Copyright © 2026 MLX Contributors

"""Folders of answers and pairs that ``mlx_lm.dpo_collect`` wrote."""

from pathlib import Path

from ..errors import InputError
from .sources import FOLDERS, split_files


def is_collected(folder: str | Path) -> bool:
    """Whether a folder is one of mlx_lm.dpo_collect."""
    return (Path(folder) / "answers.jsonl").is_file()


def _collected_splits(folder: Path) -> dict[str, list[Path]]:
    """The files of the pairs; what validates a run tests it, too."""
    if not is_collected(folder):
        return {}
    files = split_files(folder)
    if "valid" in files:
        files.setdefault("test", files["valid"])
    if not files and not split_files(folder / "data"):
        raise InputError(
            f"{folder} holds answers, but no pairs of them yet: label them, as with "
            f"mlx_lm.dpo_collect --label human --output {folder}"
        )
    return files


FOLDERS.append(_collected_splits)
