# Copyright © 2026 MLX Contributors

"""Some rows of files that are too large to be read whole: found again by their number."""

import gzip
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..files import plain_size
from .arrow import unpacked_bytes
from .parsing import GZIP, UTF_8, Rows, kind_of, read_line, reading, room, too_large
from .sources import FileRows
from .tables import (
    CELLS,
    TABLES,
    arrow_batches,
    is_parquet,
    parquet_bytes,
    reading_tables,
    table_rows,
)

# Lines are counted in each, and those that hold a wanted line are read again.
BLOCK = 2**16
# Rows that are longer are left out in any case.
_LONGEST = 2**24
# Rows of a table that are unpacked at a time.
PART = 512
# Text is seldom packed any closer.
_PACKED = 20


class LargeLines:
    """The lines of a JSONL file, packed or not."""

    def __init__(self, path: Path):
        self.path = path

    def is_packed(self) -> bool:
        """Whether the file is compressed."""
        with open(self.path, "rb") as file:
            return file.read(2) == GZIP

    @contextmanager
    def _open(self) -> Iterator[Any]:
        # Both can be sought forwards.
        with (gzip.open if self.is_packed() else open)(self.path, "rb") as file:
            yield file

    def holds_rows(self) -> bool:
        """Whether lines are rows: not those of one list, or of objects of several."""
        with self._open() as file:
            lines = iter(lambda: file.readline(_LONGEST), b"")
            first = next((x for x in lines if x.removeprefix(UTF_8).strip()), b"")
        return isinstance(read_line(first.removeprefix(UTF_8)), Mapping)

    @cached_property
    def _counted(self) -> tuple[np.ndarray, int, int]:
        """In which line each block begins and the last one ends; bytes, and lines."""
        counts, size, last = [0], 0, b"\n"
        with self._open() as file:
            while block := file.read(BLOCK):
                # In a third of the time that bytes.count takes.
                ends = np.frombuffer(block, np.uint8) == ord("\n")
                counts.append(np.count_nonzero(ends))
                size, last = size + len(block), block
        firsts = np.cumsum(counts)
        # The last line may have no end.
        return firsts, size, int(firsts[-1]) + (not last.endswith(b"\n"))

    @property
    def size(self) -> int:
        """The bytes of all lines."""
        return self._counted[1]

    def __len__(self) -> int:
        return self._counted[2]

    def take(self, numbers: np.ndarray) -> Rows:
        """The rows of some lines, whose numbers rise. Blank ones are none."""
        firsts = self._counted[0]
        lines = dict.fromkeys(numbers.tolist(), b"")
        # A line that a block ends in goes on in the next.
        begin = np.searchsorted(numbers, firsts[:-1])
        end = np.searchsorted(numbers, firsts[1:], "right")
        with self._open() as file:
            for block in np.flatnonzero(end > begin).tolist():
                file.seek(block * BLOCK)
                parts = file.read(BLOCK).split(b"\n")
                for number in numbers[begin[block] : end[block]].tolist():
                    if len(lines[number]) < _LONGEST:
                        lines[number] += parts[number - int(firsts[block])]
        if 0 in lines:
            lines[0] = lines[0].removeprefix(UTF_8)
        name = self.path.name
        return [
            (read_line(line), f"{name}:{number + 1}")
            for number, line in lines.items()
            if line.strip()
        ]


class LargeTable:
    """The rows of a Parquet or Arrow file."""

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            self._head = file.read(6)

    def is_packed(self) -> bool:
        """Whether arrays of an Arrow file are compressed, however many at a time."""
        if is_parquet(self._head, self.path) or not self.path.stat().st_size:
            return False
        return unpacked_bytes(memoryview(np.memmap(self.path, mode="r"))) > 0

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        """A Parquet file, or the mapped source of an Arrow file."""
        with reading_tables(self.path):
            from pyarrow import memory_map, parquet

            if is_parquet(self._head, self.path):
                # Not a whole group of rows at a time.
                with parquet.ParquetFile(self.path, pre_buffer=False) as file:
                    yield file, None
            else:
                with memory_map(str(self.path)) as source:
                    yield None, source

    @cached_property
    def _counted(self) -> tuple[int, int]:
        """The bytes of all rows, and how many there are."""
        with self._open() as (file, source):
            if file is not None:
                return parquet_bytes(file), file.metadata.num_rows
            counts = map(len, arrow_batches(source, self._head))
            return self.path.stat().st_size, sum(counts)

    @property
    def size(self) -> int:
        """The bytes of all rows, unpacked."""
        return self._counted[0]

    def __len__(self) -> int:
        return self._counted[1]

    def take(self, numbers: np.ndarray) -> Rows:
        """The rows of some numbers, which rise."""
        rows: Rows = []
        with self._open() as given:
            for first, part in self._parts(numbers, *given):
                begin, end = np.searchsorted(numbers, (first, first + len(part)))
                if begin < end:
                    found = table_rows(part.take(numbers[begin:end] - first))
                    places = (numbers[begin:end] + 1).tolist()
                    rows += zip(found, (f"{self.path.name}:{i}" for i in places))
        return rows

    def _parts(self, numbers, file, source):
        """Parts of the table, and the number of the first row of each."""
        first = 0
        if file is None:
            for batch in arrow_batches(source, self._head):
                yield first, batch
                first += len(batch)
            return
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            begin, end = np.searchsorted(numbers, (first, first + count))
            start = first
            for batch in file.iter_batches(PART, [group]) if begin < end else ():
                yield start, batch
                start += len(batch)
            first += count


def open_large(path: Path) -> LargeLines | LargeTable | None:
    """What finds some rows of a file; nothing if it can only be read whole."""
    with reading(path):
        plain_size(path)
        lines = LargeLines(path)
        if kind_of(path) in TABLES:
            whole = lines.is_packed() or LargeTable(path).is_packed()
            return None if whole else LargeTable(path)
        return lines if kind_of(path) not in CELLS and lines.holds_rows() else None


def largest_size(path: Path) -> int:
    """The bytes that a file's rows have at most, without unpacking them."""
    with reading(path):
        size = plain_size(path)
        if LargeLines(path).is_packed():
            return size * _PACKED
        return LargeTable(path).size if kind_of(path) in TABLES else size


class LargeRows:
    """The rows of several files, of which some can be taken."""

    def __init__(self, files: Sequence[LargeLines | LargeTable]):
        self._files = files

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self._files)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, numbers: np.ndarray) -> Rows:
        """The rows of some numbers, which rise, with their places."""
        rows: Rows = []
        for file, first, end in zip(self._files, self._ends, self._ends[1:]):
            there = numbers[slice(*np.searchsorted(numbers, (first, end)))]
            with reading(file.path):
                rows += file.take(there - first) if len(there) else []
        return rows


class PartsOfFiles:
    """Files of which some rows can be taken without the others."""

    def __init__(self, rows: FileRows):
        self._rows = rows

    @cached_property
    def _large(self) -> list:
        return [*map(open_large, self._rows.paths)]

    def size(self, exactly: bool = True) -> int:
        """The bytes of the rows, unpacked; else a bound that is known at once."""
        paths = self._rows.paths
        if not exactly:
            return sum(map(largest_size, paths))
        pairs = zip(paths, self._large)
        return sum(large.size if large else plain_size(path) for path, large in pairs)

    def some(self) -> FileRows | LargeRows:
        """The rows, of which some can be taken without the others."""
        if all(self._large):
            return LargeRows(self._large)
        path = self._rows.paths[self._large.index(None)]
        if not self._rows.is_read and self.size(False) > room():
            raise too_large(path, "make it JSONL, a row a line, or Parquet")
        return self._rows
