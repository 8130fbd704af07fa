# Copyright © 2026 MLX Contributors

"""A name for arrays, settings and trees of them, which follows from their content."""

from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache
from hashlib import blake2b
from hashlib import file_digest as _file_digest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

ROW_WORDS = 2**16
# Arrays up to this are copied in less time than they are summed up.
SMALL_BYTES = 2**16


def digest(*values: Any, size: int = 16) -> str:
    """Name values, in hexadecimal: alike in every process and on every device."""
    state = blake2b(digest_size=size)
    for part in _parts(values):
        state.update(part)
    return state.hexdigest()


def bytes_digest(*parts: bytes, size: int = 16) -> bytes:
    """What ``digest`` of some bytes stands for, in a tenth of the time."""
    named = b"".join([b"%d bytes:%b" % (len(part), part) for part in parts])
    return blake2b(b"[%b]" % named, digest_size=size).digest()


def file_digest(path: Path) -> str:
    """Name the bytes of a file, without holding them in memory."""
    with open(path, "rb") as file:
        return _file_digest(file, blake2b).hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    """Yield bytes that tell a value from all others; lists and tuples are alike."""
    if isinstance(value, np.ndarray):
        yield f"{value.dtype.str}{value.shape}:".encode()
        yield value.tobytes()
    elif isinstance(value, mx.array):
        yield f"{value.dtype}{value.shape}:".encode()
        yield from _checksums(value)
    elif isinstance(value, bytes):
        yield b"%d bytes:" % len(value)
        yield value
    elif isinstance(value, (list, tuple, Iterator)):
        yield b"["
        for child in value:
            if type(child) is bytes:
                yield b"%d bytes:%b" % (len(child), child)
            else:
                yield from _parts(child)
        yield b"]"
    elif isinstance(value, dict):
        yield b"{"
        for key in sorted(value, key=str):
            yield from _parts(str(key))
            yield from _parts(value[key])
        yield b"}"
    elif isinstance(value, (set, frozenset)):
        yield b"set"
        yield from _parts(sorted(map(digest, value)))
    elif isinstance(value, SimpleNamespace) or is_dataclass(value):
        yield from _parts([type(value).__qualname__, vars(value)])
    elif hasattr(value, "tolist"):
        yield from _parts(value.tolist())
    else:
        is_plain = value is None or isinstance(value, (bool, int, float, str, mx.Dtype))
        kind = getattr(value, "__qualname__", type(value).__qualname__)
        text = (repr(value) if is_plain else kind).encode()
        yield b"%d:" % len(text)
        yield text


@cache
def _multipliers():
    """Two rows of random odd numbers; PCG64's stream is the same everywhere."""
    numbers = np.random.PCG64(0).random_raw(2 * ROW_WORDS) | np.uint64(1)
    return mx.array(numbers).reshape(2, ROW_WORDS)


def _row_sums(words):
    """Two weighted sums modulo 2^64 of each row, as bytes."""
    first, second = _multipliers()[:, : words.shape[1]]
    # The top bits of a word weigh little in the first sum: the second has them low.
    mixed = words ^ (words >> mx.array(32, dtype=mx.uint64))
    sums = [(words * first).sum(axis=1), (mixed * second).sum(axis=1)]
    return np.array(mx.stack(sums, axis=1)).tobytes()


def _checksums(tensor):
    """Yield checksums of a tensor's bits, computed where the tensor is."""
    flat = tensor.reshape(-1)
    if 0 < tensor.nbytes <= SMALL_BYTES:
        yield np.array(flat.view(mx.uint8)).tobytes()
        return
    # What fits into the caches of a CPU keeps a GPU waiting for the host.
    rows = 8 if mx.default_device() == mx.cpu else 64
    step = rows * ROW_WORDS * 8 // tensor.itemsize
    for start in range(0, flat.size, step):
        part = flat[start : start + step]
        words = -(-part.nbytes // 8)
        # A slice may begin between two words; its copy, made longer, does not.
        room = (8 * (words + 1) - part.nbytes) // tensor.itemsize
        part = mx.concatenate([part, mx.zeros((room,), dtype=tensor.dtype)])
        part = part.view(mx.uint64)[:words]
        full = words // ROW_WORDS * ROW_WORDS
        if full:
            yield _row_sums(part[:full].reshape(-1, ROW_WORDS))
        if full < words:
            yield _row_sums(part[full:].reshape(1, -1))
