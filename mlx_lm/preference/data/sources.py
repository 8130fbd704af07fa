# Copyright © 2026 MLX Contributors

"""Raw preference rows out of local files and folders."""

import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..digest import digest, file_digest
from ..errors import InputError
from ..files import plain_size, read_plain
from ..terminal import rprint
from .large import LargeRows, largest_size, open_large
from .parsing import check_room, parse_file, reading, room, too_large
from .secrets import hide_values

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
SPLIT_NAMES = {"train": "train", "valid": "validation", "test": "test"}
SUFFIXES = (
    *(".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".arrow"),
    *(".csv", ".csv.gz", ".tsv"),
)
_SHARD = re.compile(r"-\d+-of-\d+.*$")


class LocatedRows(Sequence):
    """Raw rows of a data set that has a name."""

    def __init__(self, rows: Any, name: str):
        self._rows, self._name = rows, name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def location(self, index: int) -> str:
        """Name the place of a row."""
        return f"{self._name}:{index + 1}"

    def size(self, exactly: bool = True) -> int:
        """The bytes of the rows, 0 if they lie in no table."""
        table = getattr(self._rows, "data", ())
        # Some rows of a table have the whole one.
        return getattr(table, "nbytes", 0) * len(self) // max(len(table), 1)

    def some(self) -> "LocatedRows":
        """The rows, of which some can be taken without the others."""
        return self

    def fingerprint(self) -> str | None:
        """Hash the rows' content and places."""
        rows = rows_fingerprint(self._rows)
        return rows and digest(self._name, rows)


class FileRows(Sequence):
    """The rows of some files, which are read when the first row is asked for."""

    def __init__(self, paths: Sequence[str | Path]):
        self._paths = list(map(Path, paths))

    @cached_property
    def _content(self) -> tuple[list, list[str], str]:
        return _read(self._paths)

    def __len__(self) -> int:
        return len(self._content[0])

    def __getitem__(self, index: Any) -> Any:
        return self._content[0][index]

    def location(self, index: int) -> str:
        """Name the place of a row."""
        return self._content[1][index]

    def size(self, exactly: bool = True) -> int:
        """The bytes of the rows, unpacked; else a bound that is known at once."""
        if not exactly:
            return sum(map(largest_size, self._paths))
        pairs = zip(self._paths, self._large)
        return sum(large.size if large else plain_size(path) for path, large in pairs)

    @cached_property
    def _large(self) -> list:
        return [*map(open_large, self._paths)]

    def some(self) -> "FileRows | LargeRows":
        """The rows, of which some can be taken without the others."""
        if all(self._large):
            return LargeRows(self._large)
        path = self._paths[self._large.index(None)]
        if "_content" not in vars(self) and self.size(False) > room():
            raise too_large(path, "make it JSONL, a row a line, or Parquet")
        return self

    def fingerprint(self) -> str | None:
        """Hash the files' names and bytes, without reading rows."""
        if "_content" in vars(self):
            return self._content[2]
        digests = []
        for path in self._paths:
            try:
                if not path.is_file():
                    return None
                digests.append(file_digest(path))
            except OSError:
                return None
        return _files_fingerprint(self._paths, digests)


def _files_fingerprint(paths: Sequence[Path], digests: Sequence[str]) -> str:
    # The names show up in places, and tell how to read the bytes.
    return digest([path.name for path in paths], digests)


Splits = dict[str, Callable[[], LocatedRows | FileRows]]


def pick_splits(names: Iterable[str]) -> dict[str, str]:
    """Find the train, valid and test split among the names that a dataset uses."""
    known = {name.lower().replace("-", "_"): name for name in names}
    picked = {}
    for split, aliases in SPLIT_ALIASES.items():
        found = next((known[alias] for alias in aliases if alias in known), None)
        if found is not None:
            picked[split] = found
    return picked


def open_local_splits(path: str | Path, data_dir: str | None = None) -> Splits:
    """Find the splits of a local folder or file. Nothing is read yet."""
    path = Path(path).expanduser() / (data_dir or "")
    if not path.exists():
        raise InputError(f"Found no data at {path}.")
    if path.is_file():
        return {"train": partial(FileRows, [path])}
    if saved := _saved_splits(path):
        return {split: partial(FileRows, f) for split, f in saved.items()}
    for folder in (path, path / "data"):
        files = _split_files(folder)
        if "valid" in files and is_collected(folder):
            files.setdefault("test", files["valid"])
        if files:
            return {split: partial(FileRows, f) for split, f in files.items()}
    if is_collected(path):
        raise InputError(
            f"{path} holds answers, but no pairs of them yet: label them, as with "
            f"mlx_lm.dpo_collect --label human --output {path}"
        )
    raise InputError(
        f"Found no split in {path}: it needs train.jsonl (or .json, .jsonl.gz, "
        ".parquet, .csv), and may have valid and test files beside it."
    )


def is_collected(folder: str | Path) -> bool:
    """Whether a folder is one of mlx_lm.dpo_collect."""
    return (Path(folder) / "answers.jsonl").is_file()


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


def _read(paths: Sequence[Path]) -> tuple[list, list[str], str]:
    """The rows, their places, and the fingerprint of the very bytes they came from."""
    rows: list = []
    places: list[str] = []
    digests = []
    for path in paths:
        with reading(path):
            check_room(path, path.stat().st_size)
            raw = read_plain(path)
            digests.append(blake2b(raw).hexdigest())
            new = parse_file(raw, path)
        rows.extend(row for row, _ in new)
        places.extend(place for _, place in new)
    return rows, places, _files_fingerprint(paths, digests)


def open_sources(data: Any, data_dir: str | None = None) -> list[tuple]:
    """For each dataset its name, the options of its own, and its splits."""
    if isinstance(data, (str, Path)):
        name = str(data)
        is_path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
        if is_path or Path(name).exists():
            return [(name, {}, open_local_splits(name, data_dir))]
        data = {"path": name, "data_dir": data_dir}
    sources = []
    for entry in [data] if isinstance(data, Mapping) else data:
        if not isinstance(entry, Mapping) or not entry.get("path"):
            raise InputError(f"hf_dataset needs a path, got {entry!r}.")
        name = entry["path"]
        rprint(f"Loading Hugging Face dataset {name}.")
        config = dict(entry.get("config") or {})
        if entry.get("data_dir"):
            config["data_dir"] = entry["data_dir"]
        splits = {split: entry.get(f"{split}_split") for split in SPLIT_ALIASES}
        sources.append((name, entry, open_hub_splits(name, config, splits)))
    return sources


def needed_splits(sources: list, train: bool, test: bool, inspect: bool) -> list[str]:
    """The splits to read. Those that must be there are."""
    there = {name for _, _, splits in sources for name in splits}
    where = ", ".join(source for source, _, _ in sources)
    names = [name for name, on in (("train", train), ("test", test)) if on]
    for name in names:
        if name not in there:
            raise InputError(
                f"Found no {SPLIT_NAMES[name]} set in {where}, but {name}: true needs "
                "one."
            )
    if inspect and not test:
        # One for validation may be held out.
        if not train and not there & {"test", "valid"}:
            raise InputError(
                f"Found no test or validation set in {where}, but inspect needs one."
            )
        names.append("test" if "test" in there else "valid")
    return [*names, "valid"] if train else names


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
    for split, spec in specs.items():
        if re.split(r"[\[+]", spec)[0] in SPLIT_ALIASES["train"]:
            raise InputError(
                f"{name}: give train_split beside {split}_split, they may overlap."
            )
    loaded = _load_hub(name, config)
    picked = pick_splits(loaded.keys())
    if not picked and len(loaded) == 1:
        picked = {"train": next(iter(loaded))}
    if not picked:
        raise InputError(
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
    except (exceptions.DatasetsError, OSError, ValueError) as e:
        reason = hide_values(" ".join(str(e).split()), kwargs)
        raise InputError(f"Can't load {name}: {reason}") from e


def find_hub_name(name: str) -> str | None:
    """Look for a dataset on the Hugging Face Hub in any letter case."""
    from huggingface_hub import HfApi

    for query in dict.fromkeys((name, name.split("/")[-1])):
        for info in HfApi().list_datasets(search=query, limit=500):
            if info.id.lower() == name.lower() and info.id != name:
                return info.id
    return None


def rows_fingerprint(rows: Sequence[Any]) -> str | None:
    """Hash the content and the places of raw rows."""
    own = getattr(rows, "fingerprint", None)
    if callable(own):
        return own()
    if isinstance(found := getattr(rows, "_fingerprint", None), str):
        return digest("datasets", found)
    # Rows hold anything that Python knows; pickle tells all of it apart.
    try:
        locate = getattr(rows, "location", int)
        return digest(pickle.dumps((locate(i), rows[i]), 4) for i in range(len(rows)))
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError):
        return None
