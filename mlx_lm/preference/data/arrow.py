# Copyright © 2026 MLX Contributors

"""How large an Arrow file is unpacked, before anything of it is.

Its own reader tells no sizes and unpacks a batch at once. The format says them: each
message lists its buffers, and a packed buffer begins with its length,
https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc
"""

import struct
from collections.abc import Iterator

import numpy as np

_DICTIONARIES, _BATCH = 2, 3
# Where a message begins, how long it and its arrays are.
_BLOCK = np.dtype([("at", "<i8"), ("head", "<i4"), ("_", "<i4"), ("body", "<i8")])
_BUFFER = np.dtype([("at", "<i8"), ("size", "<i8")])


def unpacked_bytes(raw: bytes | memoryview) -> int:
    """The bytes that the packed arrays of an Arrow file or stream say they have."""
    # What can't be read here is the reader's to refuse.
    size = 0
    try:
        messages = _of_file if raw[:6] == b"ARROW1" else _of_stream
        for head, body in messages(memoryview(raw)):
            size += _unpacked(head, body)
    except (struct.error, ValueError, IndexError):
        pass
    return size


def _of_file(raw: memoryview) -> Iterator[tuple[memoryview, memoryview]]:
    """The messages that a file's last table lists: their heads and their arrays."""
    (size,) = _numbers("<i", raw, len(raw) - 10)
    footer = raw[len(raw) - 10 - size : len(raw) - 10]
    root = _root(footer)
    for field in (2, 3):
        for at, head, _, body in _list(footer, root, field, _BLOCK).tolist():
            first, size = _numbers("<ii", raw, at)
            start = at + (8 if first == -1 else 4)
            yield raw[start : at + head], raw[at + head : at + head + body]


def _of_stream(raw: memoryview) -> Iterator[tuple[memoryview, memoryview]]:
    """The messages of a stream, one behind the other."""
    at = 0
    while at + 8 <= len(raw):
        first, size = _numbers("<ii", raw, at)
        if first != -1:
            at, size = at - 4, first
        if size <= 0:
            return
        head = raw[at + 8 : at + 8 + size]
        body = at + 8 + size
        length = _field(head, _root(head), 3)
        (size,) = _numbers("<q", head, length) if length else (0,)
        yield head, raw[body : body + size]
        at = body + max(size, 0)


def _unpacked(head: memoryview, body: memoryview) -> int:
    root = _root(head)
    at = _field(head, root, 1)
    kind, batch = head[at] if at else 0, _table(head, root, 2)
    if kind == _DICTIONARIES and batch:
        batch = _table(head, batch, 1)
    elif kind != _BATCH:
        return 0
    if not batch or not _table(head, batch, 3):
        return 0
    found = [
        _numbers("<q", body, at)[0]
        for at, size in _list(head, batch, 2, _BUFFER).tolist()
        if size >= 8
    ]
    return sum(size for size in found if size > 0)


def _numbers(form: str, raw: memoryview, at: int) -> tuple[int, ...]:
    if at < 0:
        raise ValueError("before the start")
    return struct.unpack_from(form, raw, at)


def _root(raw: memoryview) -> int:
    return _numbers("<I", raw, 0)[0]


def _field(raw: memoryview, table: int, number: int) -> int:
    """Where a field of a table lies, 0 if it has none."""
    fields = table - _numbers("<i", raw, table)[0]
    (size,) = _numbers("<H", raw, fields)
    at = 4 + 2 * number
    place = _numbers("<H", raw, fields + at)[0] if at < size else 0
    return table + place if place else 0


def _table(raw: memoryview, table: int, number: int) -> int:
    at = _field(raw, table, number)
    return at + _numbers("<I", raw, at)[0] if at else 0


def _list(raw: memoryview, table: int, number: int, kind: np.dtype) -> np.ndarray:
    at = _table(raw, table, number)
    count = _numbers("<I", raw, at)[0] if at else 0
    return np.frombuffer(raw, kind, count, at + 4 if at else 0)
