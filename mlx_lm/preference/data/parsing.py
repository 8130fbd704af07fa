# Copyright © 2026 MLX Contributors

"""The bytes of a file to raw rows with their places."""

import codecs
import gzip
import io
import json
import math
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..device import system_memory
from ..errors import InputError
from ..plug_ins import load
from .content import RowFault

Rows = list[tuple[Any, str]]
GZIP, UTF_8 = b"\x1f\x8b", codecs.BOM_UTF8
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BLANK = re.compile(r"\s*(?=\S)")
# By the ends of files' names.
PARSERS: dict[str, Callable[[bytes, Path], Rows]] = {}
SUFFIXES = [".jsonl", ".jsonl.gz", ".json", ".json.gz"]


def parse_file(raw: bytes, path: Path) -> Rows:
    """The rows of a file. A row that can't be read is a ``RowFault``."""
    parse = PARSERS.get(kind_of(path), _parse_json)
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
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
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
    raw = as_utf8(raw)
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


def as_utf8(raw: bytes) -> bytes:
    """Text of Windows' tools, or with a mark before it, as the others have it."""
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


# Each adds to the table.
PLUG_INS = ("tables",)
load(__package__, PLUG_INS)
