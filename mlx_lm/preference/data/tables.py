# Copyright © 2026 MLX Contributors

"""Rows of tables: CSV, Parquet and Arrow."""

import ast
import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError
from .arrow import unpacked_bytes
from .content import RowFault
from .parsing import PARSERS, SUFFIXES, Rows, as_utf8, check_room

TABLES, CELLS = (".parquet", ".arrow"), (".csv", ".tsv")
# Columns whose cells are texts, also where all of them look like numbers.
_TEXTS = re.compile(
    "(prompt|question|query|instruction|input|context|history|system|chosen|rejected|"
    "completion|response|answer|output|text|human_ref)(_?([0-9]+|[ab]|text))?"
)
# Columns of lists, whatever is in these.
_LISTS = ("ranking", "responses", "ranking_tokens", "chosen_tokens", "rejected_tokens")


def _parse_csv(raw: bytes, path: Path) -> Rows:
    """A table with a line of names; cells may go over several lines."""
    text = as_utf8(raw).decode("utf-8")
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
    lists = ("[",) if name in _LISTS else ("[{", "[[", "{")
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
    """The rows of a part of a table, without its dates if Python lacks one of them."""
    try:
        return part.to_pylist()
    except (UnicodeDecodeError, OverflowError, LookupError):
        from pyarrow.types import is_temporal

        # No shape reads a date, and tables can hold more of them, in unknown zones.
        kept = [i for i, kind in enumerate(part.schema.types) if not is_temporal(kind)]
        if len(kept) < part.num_columns:
            return table_rows(part.select(kept))
        return [_table_row(part, i) for i in range(len(part))]


def _table_row(table: Any, index: int) -> Any:
    try:
        return table.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return RowFault("invalid UTF-8")
    except (OverflowError, LookupError):
        return RowFault("a date that Python lacks")


PARSERS |= dict.fromkeys(TABLES, _parse_table) | dict.fromkeys(CELLS, _parse_csv)
SUFFIXES += [".parquet", ".arrow", ".csv", ".csv.gz", ".tsv", ".tsv.gz"]
