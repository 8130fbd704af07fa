# Copyright © 2026 MLX Contributors

"""Raw preference rows out of local files and folders, and from the Hugging Face Hub."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..cli_ui import rprint
from .preference_messages import RowFault

_BASES = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
# Splits made for preferences win over those made for other trainers.
SPLIT_ALIASES = {
    split: tuple(f"{base}_prefs" for base in bases) + bases
    for split, bases in _BASES.items()
}
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_SHARD = re.compile(r"-\d+-of-\d+.*$")


class LocatedRows(Sequence):
    """
    Raw rows that know where they come from.

    Args:
        rows (Sequence): The rows. A :class:`RowFault` takes the place of a row
            that could not be read.
        places (Sequence or str): For each row its place, such as
            ``"train.jsonl:12"``, or one name that is put before row numbers.

    Example:
        >>> LocatedRows([{"chosen": "yes"}], "prefs[train]").location(0)
        'prefs[train]:1'
    """

    def __init__(self, rows: Any, places: Sequence[str] | str):
        self._rows = rows
        self._places = places

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def location(self, index: int) -> str:
        """
        Name the place of a row.

        Args:
            index (int): The row's index.

        Returns:
            str: File and line, or name and row number, counted from 1.
        """
        if isinstance(self._places, str):
            return f"{self._places}:{index + 1}"
        return self._places[index]


Splits = dict[str, Callable[[], LocatedRows]]


def pick_splits(names: Iterable[str]) -> dict[str, str]:
    """
    Find the train, valid and test split among the names that a dataset uses.

    Args:
        names (Iterable): The names, such as "train_prefs" or "validation".

    Returns:
        dict: ``train``, ``valid`` and ``test`` as far as they are there, each
        with the name that the dataset uses.

    Example:
        >>> pick_splits(["train_sft", "train_prefs", "test_prefs", "dev"])
        {'train': 'train_prefs', 'valid': 'dev', 'test': 'test_prefs'}
    """
    known = {name.lower().replace("-", "_"): name for name in names}
    picked = {}
    for split, aliases in SPLIT_ALIASES.items():
        found = next((known[alias] for alias in aliases if alias in known), None)
        if found is not None:
            picked[split] = found
    return picked


def open_local_splits(path: str | Path, data_dir: str | None = None) -> Splits:
    """
    Find the splits of a local folder or file. Nothing is read yet.

    Args:
        path (str or Path): A folder with files such as ``train.jsonl`` or
            ``validation-00000-of-00002.parquet``, or one file, which is all train.
        data_dir (str, optional): A folder inside ``path``.

    Returns:
        dict: For each split a function that reads its rows.

    Raises:
        ValueError: If there is no such file or folder, or no split in it.

    Example:
        >>> open_local_splits("no/such/folder")
        Traceback (most recent call last):
        ...
        ValueError: Found no data at no/such/folder.
    """
    path = Path(path).expanduser()
    path = path / data_dir if data_dir else path
    if not path.exists():
        raise ValueError(f"Found no data at {path}.")
    if path.is_file():
        return {"train": partial(read_files, [path])}
    for folder in (path, path / "data"):
        files = _split_files(folder)
        if files:
            return {split: partial(read_files, f) for split, f in files.items()}
    raise ValueError(
        f"Found no split in {path}: it needs train.jsonl (or .json, .jsonl.gz, "
        ".parquet), and may have valid and test files beside it."
    )


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split; the first kind wins where one split has several."""
    stems: dict[str, dict[str, list[Path]]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        suffix = _suffix(file)
        if suffix and file.is_file():
            stem = _SHARD.sub("", file.name[: -len(suffix)])
            stems.setdefault(stem, {}).setdefault(suffix, []).append(file)
    result = {}
    for split, stem in pick_splits(stems).items():
        kinds = sorted(stems[stem], key=SUFFIXES.index)
        result[split] = stems[stem][kinds[0]]
        if len(kinds) > 1:
            others = ", ".join(stem + kind for kind in kinds[1:])
            rprint(f"Reading {stem}{kinds[0]}, not {others}, as the {split} split.")
    return result


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    return next((s for s in reversed(SUFFIXES) if name.endswith(s)), None)


def read_files(paths: Sequence[str | Path]) -> LocatedRows:
    """
    Read the rows of some files, one after the other.

    A line that is no JSON object or no UTF-8 becomes a :class:`RowFault` in the
    row's place. Blank lines don't count.

    Args:
        paths (Sequence): Files ending in .jsonl, .json (a list or one object a
            line), .jsonl.gz, .json.gz or .parquet.

    Returns:
        LocatedRows: The rows with file and line.

    Raises:
        ValueError: If a file can't be read, is empty or holds no JSON object.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "train.jsonl"
        >>> _ = path.write_text('{"chosen": "yes", "rejected": "no"}')
        >>> read_files([path])[0]
        {'chosen': 'yes', 'rejected': 'no'}
    """
    rows: list = []
    places: list[str] = []
    for path in map(Path, paths):
        try:
            new = (
                _read_parquet(path) if _suffix(path) == ".parquet" else _read_json(path)
            )
        except (OSError, EOFError, zlib.error) as e:
            raise ValueError(f"Can't read {path}: {' '.join(str(e).split())}") from e
        if not any(isinstance(row, Mapping) for row, _ in new):
            what = "holds no JSON object" if new else "is empty"
            raise ValueError(f"{path} {what}: it should have one a line, or a list.")
        rows.extend(row for row, _ in new)
        places.extend(place for _, place in new)
    return LocatedRows(rows, places)


def _read_parquet(path: Path) -> list[tuple[Any, str]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as e:
        raise ValueError(f"{path} needs pyarrow: pip install 'mlx-lm[train]'") from e
    try:
        rows = parquet.read_table(path).to_pylist()
    except ArrowException as e:
        raise ValueError(f"Can't read {path}: {' '.join(str(e).split())}") from e
    return [(row, f"{path.name}:{i}") for i, row in enumerate(rows, 1)]


def _read_json(path: Path) -> list[tuple[Any, str]]:
    raw = path.read_bytes()
    # Some tools name compressed files .jsonl.
    raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if raw.lstrip()[:1] == b"[":
        whole = _parse(raw)
        if isinstance(whole, list):
            return [(_as_row(row), f"{path.name}[{i}]") for i, row in enumerate(whole)]
    lines = enumerate(raw.split(b"\n"), 1)
    rows = [(_as_row(_parse(s)), f"{path.name}:{i}") for i, s in lines if s.strip()]
    if len(rows) > 1 and not any(isinstance(row, Mapping) for row, _ in rows):
        # One object over several lines.
        whole = _parse(raw)
        if isinstance(whole, Mapping):
            return [(whole, f"{path.name}:1")]
    return rows


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return RowFault("invalid UTF-8")
    except (ValueError, RecursionError) as e:
        return RowFault("unreadable JSON", str(e))


def _as_row(row: Any) -> Any:
    if isinstance(row, (Mapping, RowFault)):
        return row
    return RowFault("not a JSON object", type(row).__name__)


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
