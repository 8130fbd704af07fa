# Copyright © 2026 MLX Contributors

"""Raw preference rows out of local files and folders."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_plain
from ..plug_ins import load
from ..terminal import rprint
from .parsing import SUFFIXES, check_room, parse_file, reading

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
_SHARD = re.compile(r"-\d+-of-\d+.*$")


class LocatedRows(Sequence):
    """Raw rows of a data set that has a name."""

    def __init__(self, rows: Any, name: str):
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def location(self, index: int) -> str:
        """Name the place of a row."""
        return f"{self.name}:{index + 1}"

    def size(self, exactly: bool = True) -> int:
        """The bytes of the rows, 0 if they lie in no table."""
        table = getattr(self.rows, "data", ())
        # Some rows of a table have the whole one.
        return getattr(table, "nbytes", 0) * len(self) // max(len(table), 1)

    def some(self) -> "LocatedRows":
        """The rows, of which some can be taken without the others."""
        return self


class FileRows(Sequence):
    """The rows of some files, which are read when the first row is asked for."""

    def __init__(self, paths: Sequence[str | Path]):
        self.paths = list(map(Path, paths))

    @cached_property
    def _content(self) -> tuple[list, list[str], list[str]]:
        return _read(self.paths)

    @property
    def is_read(self) -> bool:
        """Whether the rows are in memory."""
        return "_content" in vars(self)

    def __len__(self) -> int:
        return len(self._content[0])

    def __getitem__(self, index: Any) -> Any:
        return self._content[0][index]

    def location(self, index: int) -> str:
        """Name the place of a row."""
        return self._content[1][index]

    def digests(self) -> list[str]:
        """The digests of the very bytes that the rows came from."""
        return self._content[2]


Splits = dict[str, Callable[[], LocatedRows | FileRows]]
# Folders that others write: the files of their splits. And what opens an entry of data
# that are no files here: its name, itself, its splits.
FOLDERS: list[Callable[[Path], dict[str, list[Path]]]] = []
ELSEWHERE: list[Callable[[Any], tuple[str, Mapping, Splits]]] = []


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
    for folder in (path, path / "data"):
        found = (read(folder) for read in (*FOLDERS, split_files))
        if files := next(filter(None, found), None):
            return {split: partial(FileRows, f) for split, f in files.items()}
    raise InputError(
        f"Found no split in {path}: it needs train.jsonl (or .json, .jsonl.gz, "
        ".parquet, .csv), and may have valid and test files beside it."
    )


def split_files(folder: Path) -> dict[str, list[Path]]:
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


def _read(paths: Sequence[Path]) -> tuple[list, list[str], list[str]]:
    """The rows, their places, and digests of the very bytes they came from."""
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
    return rows, places, digests


def open_sources(data: Any, data_dir: str | None = None) -> list[tuple]:
    """For each dataset its name, the options of its own, and its splits."""
    if isinstance(data, (str, Path)):
        name = str(data)
        is_path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
        try:
            if is_path or Path(name).exists():
                return [(name, {}, open_local_splits(name, data_dir))]
        except OSError as e:
            # Such as a folder that is not this user's.
            where = e.filename or name
            raise InputError(f"Can't read {where}: {e.strerror or e}.") from e
        if not ELSEWHERE:
            raise InputError(f"Found no data at {name}.")
        data = {"path": name, "data_dir": data_dir}
    entries = [data] if isinstance(data, Mapping) else data
    return [ELSEWHERE[-1](entry) for entry in entries]


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


# Each adds to the lists.
PLUG_INS = "saved", "collected", "hub"
load(__package__, PLUG_INS)
