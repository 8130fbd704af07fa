# Copyright © 2026 MLX Contributors

"""The bytes of a file to raw rows with their places: JSON, CSV, Parquet and Arrow."""

import ast
import codecs
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .messages import RowFault

Rows = list[tuple[Any, str]]
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BLANK = re.compile(r"\s*(?=\S)")
# Columns whose cells are texts, also where all of them look like numbers.
_TEXTS = re.compile(
    "(prompt|question|query|instruction|input|context|history|system|chosen|rejected|"
    "completion|response|answer|output|text)(_?([0-9]+|[ab]|text))?"
)


def parse_file(raw: bytes, path: Path) -> Rows:
    """The rows of a file. A row that can't be read is a ``RowFault``."""
    parse: Callable[[bytes, Path], Rows] = _parse_json
    kind = path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]
    if kind:
        parse = _PARSERS.get(kind[0].lower(), parse)
    try:
        # Some tools give compressed files no other name.
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        rows = parse(raw, path)
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as e:
        raise InputError(f"Can't read {path}: {' '.join(str(e).split())}") from e
    if not rows:
        raise InputError(f"{path} is empty: it should have a JSON object a line.")
    if not any(isinstance(row, Mapping) for row, _ in rows):
        fault, place = rows[0]
        raise InputError(
            f"{path} holds no JSON object ({place}: {fault.reason}, {fault.detail}): it "
            "should have one a line, or a list."
        )
    return rows


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
    lines = enumerate(raw.split(b"\n"), 1)
    rows = [(_as_row(_parse(s)), f"{path.name}:{i}") for i, s in lines if s.strip()]
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
    return raw.removeprefix(codecs.BOM_UTF8)


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
    if not _TEXTS.fullmatch(name.lower()):
        for convert in (_BOOLEANS.__getitem__, int, float):
            try:
                return [convert(x.strip().lower()) if x else None for x in cells]
            except (KeyError, ValueError):
                pass
    return [_list(name, x) if x[:2] == "[{" else x for x in cells]


_BOOLEANS = {"true": True, "false": False}


def _list(name, cell):
    """A list of messages, as JSON or as Python writes it."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    return RowFault("unreadable list", name)


def _parse_table(raw: bytes, path: Path) -> Rows:
    try:
        from pyarrow import ArrowException, BufferReader, ipc, parquet
    except ImportError as e:
        raise InputError(f"{path} needs pyarrow: pip install 'mlx-lm[train]'") from e
    try:
        if raw[:4] == b"PAR1" or path.suffix.lower() == ".parquet":
            table = parquet.read_table(BufferReader(raw))
        elif raw[:6] == b"ARROW1":
            table = ipc.open_file(BufferReader(raw)).read_all()
        else:
            table = ipc.open_stream(BufferReader(raw)).read_all()
        try:
            rows = table.to_pylist()
        except UnicodeDecodeError:
            rows = [_table_row(table, i) for i in range(len(table))]
    except ArrowException as e:
        raise InputError(f"Can't read {path}: {' '.join(str(e).split())}") from e
    return [(row, f"{path.name}:{i}") for i, row in enumerate(rows, 1)]


def _table_row(table: Any, index: int) -> Any:
    try:
        return table.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return RowFault("invalid UTF-8")


_PARSERS = {".parquet": _parse_table, ".arrow": _parse_table}
_PARSERS |= dict.fromkeys((".csv", ".tsv"), _parse_csv)
