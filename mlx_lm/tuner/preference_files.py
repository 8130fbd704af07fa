# Copyright © 2026 MLX Contributors

"""Raw preference rows out of local files and folders."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

from ..cli_ui import rprint
from .preference_messages import RowFault
from .token_cache import rows_fingerprint

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
        >>> rows = LocatedRows([{"chosen": "yes"}], "prefs[train]")
        >>> rows.location(0), len(rows.fingerprint())
        ('prefs[train]:1', 32)
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

    def fingerprint(self) -> str | None:
        """
        Hash the rows' content and places.

        Returns:
            str or None: As :func:`.token_cache.rows_fingerprint` gives it.
        """
        if not isinstance(self._places, str):
            return rows_fingerprint(list(zip(self._places, self._rows)))
        rows = rows_fingerprint(self._rows)
        return rows and rows_fingerprint([self._places, rows])


class FileRows(Sequence):
    """
    The rows of some files, which are read when the first row is asked for.

    Args:
        paths (Sequence): The files, as :func:`read_files` takes them.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "train.jsonl"
        >>> _ = path.write_text('{"chosen": "yes", "rejected": "no"}')
        >>> rows = FileRows([path])
        >>> unread = rows.fingerprint()
        >>> len(rows), rows.location(0), rows.fingerprint() == unread
        (1, 'train.jsonl:1', True)
    """

    def __init__(self, paths: Sequence[str | Path]):
        self._paths = list(map(Path, paths))

    @cached_property
    def _content(self) -> tuple[LocatedRows, str | None]:
        return _read(self._paths)

    def __len__(self) -> int:
        return len(self._content[0])

    def __getitem__(self, index: Any) -> Any:
        return self._content[0][index]

    def location(self, index: int) -> str:
        """
        Name the place of a row.

        Args:
            index (int): The row's index.

        Returns:
            str: File and line, counted from 1.
        """
        return self._content[0].location(index)

    def fingerprint(self) -> str | None:
        """
        Hash the files' names and bytes, without reading rows.

        Returns:
            str or None: 32 hexadecimal digits. Once the rows are read, those of
            the bytes that they came from; None if a file can't be opened.
        """
        if "_content" in vars(self):
            return self._content[1]
        digests = []
        for path in self._paths:
            try:
                with open(path, "rb") as file:
                    digests.append(file_digest(file, blake2b).hexdigest())
            except OSError:
                return None
        return _files_fingerprint(self._paths, digests)


def _files_fingerprint(paths: Sequence[Path], digests: Sequence[str]) -> str | None:
    # The names show up in places, and tell how to read the bytes.
    return rows_fingerprint([(p.name, d) for p, d in zip(paths, digests)])


Splits = dict[str, Callable[[], LocatedRows | FileRows]]


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
        return {"train": partial(FileRows, [path])}
    for folder in (path, path / "data"):
        files = _split_files(folder)
        if files:
            return {split: partial(FileRows, f) for split, f in files.items()}
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
    return _read(list(map(Path, paths)))[0]


def _read(paths: Sequence[Path]) -> tuple[LocatedRows, str | None]:
    """The rows, and the fingerprint of the very bytes that they came from."""
    rows: list = []
    places: list[str] = []
    digests = []
    for path in paths:
        parse = _parse_parquet if _suffix(path) == ".parquet" else _parse_json
        try:
            raw = path.read_bytes()
            digests.append(blake2b(raw).hexdigest())
            new = parse(raw, path)
        except (OSError, EOFError, zlib.error) as e:
            raise ValueError(f"Can't read {path}: {' '.join(str(e).split())}") from e
        if not any(isinstance(row, Mapping) for row, _ in new):
            what = "holds no JSON object" if new else "is empty"
            raise ValueError(f"{path} {what}: it should have one a line, or a list.")
        rows.extend(row for row, _ in new)
        places.extend(place for _, place in new)
    return LocatedRows(rows, places), _files_fingerprint(paths, digests)


def _parse_parquet(raw: bytes, path: Path) -> list[tuple[Any, str]]:
    try:
        from pyarrow import ArrowException, BufferReader, parquet
    except ImportError as e:
        raise ValueError(f"{path} needs pyarrow: pip install 'mlx-lm[train]'") from e
    try:
        table = parquet.read_table(BufferReader(raw))
        try:
            rows = table.to_pylist()
        except UnicodeDecodeError:
            rows = [_parquet_row(table, i) for i in range(len(table))]
    except ArrowException as e:
        raise ValueError(f"Can't read {path}: {' '.join(str(e).split())}") from e
    return [(row, f"{path.name}:{i}") for i, row in enumerate(rows, 1)]


def _parquet_row(table: Any, index: int) -> Any:
    try:
        return table.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return RowFault("invalid UTF-8")


def _parse_json(raw: bytes, path: Path) -> list[tuple[Any, str]]:
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
