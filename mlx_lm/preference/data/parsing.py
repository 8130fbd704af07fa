# Copyright © 2026 MLX Contributors

"""The bytes of a file to raw rows with their places: JSON, CSV, Parquet and Arrow."""

import ast
import codecs
import csv
import gzip
import io
import json
import math
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..device import system_memory
from ..errors import InputError
from .arrow import unpacked_bytes
from .messages import RowFault

Rows = list[tuple[Any, str]]
GZIP, UTF_8 = b"\x1f\x8b", codecs.BOM_UTF8
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BLANK = re.compile(r"\s*(?=\S)")
# Columns whose cells are texts, also where all of them look like numbers.
_TEXTS = re.compile(
    "(prompt|question|query|instruction|input|context|history|system|chosen|rejected|"
    "completion|response|answer|output|text|human_ref)(_?([0-9]+|[ab]|text))?"
)


def parse_file(raw: bytes, path: Path) -> Rows:
    """The rows of a file. A row that can't be read is a ``RowFault``."""
    parse = _PARSERS.get(kind_of(path), _parse_json)
    with reading(path):
        # Some tools give compressed files no other name.
        raw = _unpack(raw, path) if raw[:2] == GZIP else raw
        rows = parse(raw, path)
    if not rows:
        raise InputError(f"{path} is empty: it should have a JSON object a line.")
    if not any(isinstance(row, Mapping) for row, _ in rows):
        fault, place = rows[0]
        raise InputError(
            f"{path} holds no JSON object ({place}: {fault.reason}, {fault.detail}): it "
            "should have one a line, or a list."
        )
    return rows


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say in one line what is wrong with a file of rows."""
    try:
        yield
    except MemoryError as e:
        raise InputError(f"{path} does not fit into the memory. Split it.") from e
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or " ".join(str(e).split())
        raise InputError(f"Can't read {path}: {reason}") from e


def kind_of(path: Path) -> str:
    """How a file's name says what it holds, packed or not."""
    kind = path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]
    return kind[0].lower() if kind else ""


def room() -> float:
    """The bytes that rows may have: a quarter of the free memory, they need several."""
    free = _free(system_memory, int(time.monotonic()))
    return math.inf if free is None else free // 4


def check_room(path: Path, size: int) -> None:
    """Refuse what would take more."""
    if size > room():
        part = "use a part of it, which max_rows takes of training rows"
        raise too_large(path, part)


def too_large(path: Path, advice: str) -> InputError:
    """What is wrong with rows that take more than that."""
    return InputError(
        f"{path} holds more than {room() / 1e9:.2g} GB, a quarter of the free memory: "
        f"split it, or {advice}."
    )


@lru_cache(maxsize=1)
def _free(read, second):
    # Reading it takes milliseconds, and a data set may have a million parts.
    return read()


def _unpack(raw, path):
    """Unpack by small parts: a few bytes may stand for many."""
    parts, size = [], 0
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
        while part := file.read(2**20):
            check_room(path, size := size + len(part))
            parts.append(part)
    return b"".join(parts)


def _parse_json(raw: bytes, path: Path) -> Rows:
    raw = _as_utf8(raw)
    first = raw.lstrip().split(b"\n", 1)[0]
    begins = isinstance(_parse(first), RowFault) and first[:1]
    whole: Any = _parse(raw) if first[:1] == b"[" else None
    if isinstance(whole, list):
        return [(_as_row(row), f"{path.name}[{i}]") for i, row in enumerate(whole)]
    if begins == b"[":
        # Of its lines, each has a reason that is none.
        raise InputError(f"Can't read {path}: {whole.reason}, {whole.detail}.")
    # The least that Python needs for a row and its place.
    check_room(path, 200 * raw.count(b"\n"))
    lines = enumerate(raw.split(b"\n"), 1)
    rows = [(read_line(s), f"{path.name}:{i}") for i, s in lines if s.strip()]
    if begins == b"{" and len(rows) > 1:
        try:
            return list(_parse_objects(raw.decode("utf-8"), path.name))
        except (ValueError, RecursionError) as e:
            if not any(isinstance(row, Mapping) for row, _ in rows):
                raise InputError(f"Can't read {path}: unreadable JSON, {e}.") from e
    return rows


def _parse_objects(text: str, name: str) -> Iterator[tuple[Any, str]]:
    """Objects that go over several lines, one behind the other."""
    decoder, start, line = json.JSONDecoder(), 0, 1
    while match := _BLANK.match(text, start):
        line += text.count("\n", start, match.end())
        row, end = decoder.raw_decode(text, match.end())
        yield _as_row(row), f"{name}:{line}"
        line += text.count("\n", match.end(), end)
        start = end


def _as_utf8(raw):
    if raw.startswith(_UTF_16):
        return raw.decode("utf-16").encode("utf-8")
    return raw.removeprefix(UTF_8)


def read_line(raw: bytes) -> Any:
    """The row of a line."""
    return _as_row(_parse(raw))


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


def _parse_csv(raw: bytes, path: Path) -> Rows:
    """A table with a line of names; cells may go over several lines."""
    text = _as_utf8(raw).decode("utf-8")
    head = text.split("\n", 1)[0]
    # Spreadsheets write what their user's language has.
    delimiter = max(",;\t", key=head.count)
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(io.StringIO(text, ""), delimiter=delimiter, strict=True)
        try:
            lines = [(line, reader.line_num) for line in reader if line]
        except csv.Error as e:
            raise InputError(
                f"Can't read {path}: {e}, at line {reader.line_num}."
            ) from e
    finally:
        csv.field_size_limit(limit)
    names = lines.pop(0)[0] if lines else []
    if len(set(names)) < len(names):
        raise InputError(f"{path} names a column twice: {', '.join(names)}.")
    columns = [
        _cells(name, cells) for name, cells in zip(names, _columns(names, lines))
    ]
    rows: Rows = []
    for i, (line, number) in enumerate(lines):
        row: Any = {name: column[i] for name, column in zip(names, columns) if name}
        faults = [cell for cell in row.values() if isinstance(cell, RowFault)]
        if len(line) != len(names):
            what = f"{len(line)} cells for {len(names)} columns"
            faults = [RowFault("not a row of the table", what)]
        rows.append((faults[0] if faults else row, f"{path.name}:{number}"))
    return rows


def _columns(names, lines):
    for i in range(len(names)):
        yield [line[i] if i < len(line) else "" for line, _ in lines]


def _cells(name: str, cells: list[str]) -> list[Any]:
    """The cells of a column: texts, or all numbers, or all true or false."""
    if _TEXTS.fullmatch(name.lower()):
        return [_parts(name, x) if x[:2] == "[{" else x for x in cells]
    for convert in (_BOOLEANS.__getitem__, int, float):
        try:
            return [convert(x.strip().lower()) if x else None for x in cells]
        except (KeyError, ValueError):
            pass
    # An empty cell of a table is a value that is not there.
    lists = "[{", "[[", "{"
    return [_parts(name, x) if x.startswith(lists) else x or None for x in cells]


_BOOLEANS = {"true": True, "false": False}


def _parts(name, cell):
    """What a cell holds in parts, as JSON or as Python writes it."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    # Only of messages is it sure that the cell was no text.
    return RowFault("unreadable list", name) if cell[:2] == "[{" else cell


# Rows of a table that are read at a time.
_CHUNK = 64


def _parse_table(raw: bytes, path: Path) -> Rows:
    rows: Rows = []
    size = 0
    with reading_tables(path):
        for part in _table_parts(raw, path):
            # What a table says once may stand in all of its rows.
            check_room(path, size := size + _table_bytes(part))
            first = len(rows) + 1
            rows += [
                (x, f"{path.name}:{i}") for i, x in enumerate(table_rows(part), first)
            ]
    return rows


@contextmanager
def reading_tables(path: Path) -> Iterator[None]:
    """Say in one line what is wrong with a table, or with the installation."""
    try:
        from pyarrow import ArrowException
    except ImportError as e:
        raise InputError(f"{path} needs pyarrow: pip install 'mlx-lm[train]'") from e
    try:
        yield
    except ArrowException as e:
        raise InputError(f"Can't read {path}: {' '.join(str(e).split())}") from e


def is_parquet(head: bytes, path: Path) -> bool:
    """Tell the two kinds of tables apart."""
    return head[:4] == b"PAR1" or path.suffix.lower() == ".parquet"


def arrow_batches(source: Any, head: bytes) -> Iterator[Any]:
    """Yield the rows of an Arrow file or stream as they were written together."""
    from pyarrow import ipc

    if head[:6] != b"ARROW1":
        yield from ipc.open_stream(source)
        return
    file = ipc.open_file(source)
    yield from (file.get_batch(i) for i in range(file.num_record_batches))


def _table_parts(raw, path):
    """Yield the rows of a table, a few at a time."""
    from pyarrow import BufferReader, parquet

    if is_parquet(raw, path):
        file = parquet.ParquetFile(BufferReader(raw))
        check_room(path, parquet_bytes(file))
        yield from file.iter_batches(_CHUNK)
        return
    # Packed, a few bytes may stand for many.
    check_room(path, unpacked_bytes(raw))
    for batch in arrow_batches(BufferReader(raw), raw):
        for start in range(0, len(batch), _CHUNK):
            yield batch.slice(start, _CHUNK)


def parquet_bytes(file: Any) -> int:
    """What the rows of a Parquet file take, unpacked."""
    groups = range(file.num_row_groups)
    return sum(file.metadata.row_group(i).total_byte_size for i in groups)


def _table_bytes(part):
    # Columns of few different values are stored as numbers of these.
    plain = (getattr(x, "dictionary_decode", lambda x=x: x)() for x in part.columns)
    return 200 * len(part) + sum(column.nbytes for column in plain)


def table_rows(part: Any) -> list[Any]:
    """The rows of a part of a table."""
    try:
        return part.to_pylist()
    except UnicodeDecodeError:
        return [_table_row(part, i) for i in range(len(part))]


def _table_row(table: Any, index: int) -> Any:
    try:
        return table.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return RowFault("invalid UTF-8")


TABLES, CELLS = (".parquet", ".arrow"), (".csv", ".tsv")
_PARSERS: dict[str, Callable[[bytes, Path], Rows]] = {
    **dict.fromkeys(TABLES, _parse_table),
    **dict.fromkeys(CELLS, _parse_csv),
}
