# Copyright © 2026 MLX Contributors

"""
Token ids of large preference sets, kept on disk between runs.

A file is named by what went into it: the rows, the tokenizer with its chat template,
the options, and the version of the code that makes pairs of rows. Anything that
differs makes another name, so a file is never out of date. Files are mapped, not read.
"""

import inspect
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from hashlib import blake2b, file_digest
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..._version import __version__
from ...tokenizer_utils import TokenizerWrapper
from ..digest import digest
from ..files import drop_oldest, replace_file
from ..terminal import rprint
from .fingerprint import rows_fingerprint
from .table import OF_PAIRS, TokenColumns
from .tokenize import KEEPERS

# To be raised when the same rows get other pairs, ids or notes, or files another
# form; a test tells when.
VERSION = 15
# Fewer rows are tokenized in a second or two.
MIN_ROWS = 2000
# The folder's size, in bytes. The files used longest ago go first.
MAX_BYTES = 20 * 2**30
_ALIGNMENT = 64
# Places are texts, and stand in the file's head.
_ARRAYS = ("ids", *(name for name in OF_PAIRS if name != "places"))
# Other packages' tokenizers may change without a sign.
_KNOWN_PACKAGES = {"transformers", "mlx_lm", "builtins"}


class TokenCache:
    """The files of one tokenizer with some options, in one folder."""

    def __init__(self, folder: str | Path, tokenizer: Any, options: Mapping[str, Any]):
        self._folder = Path(folder).expanduser()
        self._tokenizer = tokenizer
        self._options = dict(options)

    def load(self, rows: Sequence[Any]) -> tuple[TokenColumns, dict[str, Any]] | None:
        """Find the tokens of some rows. Damaged files are ignored with a warning."""
        data = rows_fingerprint(rows) if os.path.isdir(self._folder) else None
        # Hashing a large vocabulary takes a while: not for rows never met.
        if not data or not any(self._folder.glob(f"{data}-*")):
            return None
        path = self._path(data)
        if path is None or not os.path.isfile(path):
            return None
        try:
            result = _read(path)
        except (OSError, ValueError, KeyError, TypeError):
            rprint(f"[WARNING] Ignoring {path}, which is damaged: tokenizing again.")
            return None
        # The folder may belong to somebody else.
        with suppress(OSError):
            os.utime(path)
        return result

    def save(
        self, rows: Sequence[Any], columns: TokenColumns, notes: Mapping[str, Any]
    ) -> None:
        """Keep the tokens of some rows. A full disk costs no more than a warning."""
        worth = len(columns) and len(rows) > MIN_ROWS
        data = rows_fingerprint(rows) if worth else None
        path = self._path(data) if data else None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            arrays = _arrays(path.stem, columns, notes)
            replace_file(path, lambda name: _write(name, arrays))
            # What a killed run left half written counts, and goes in its turn.
            drop_oldest(path.parent.glob("*.tokens"), path, MAX_BYTES)
        except OSError as e:
            reason = e.strerror or e
            rprint(f"[WARNING] Can't keep the token ids in {path.parent}: {reason}.")

    def _path(self, data: str) -> Path | None:
        name = f"{data}-{self._settings}.tokens"
        return self._folder / name if self._settings else None

    @cached_property
    def _settings(self) -> str | None:
        tokenizer = tokenizer_fingerprint(self._tokenizer)
        return tokenizer and digest(VERSION, tokenizer, self._options)


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Hash all that decides which token ids a tokenizer makes of texts and chats."""
    is_wrapper = isinstance(tokenizer, TokenizerWrapper)
    raw = tokenizer._tokenizer if is_wrapper else tokenizer
    bases = [c for c in type(raw).__mro__ if c.__module__ != "builtins"]
    backend = getattr(raw, "backend_tokenizer", None)
    render = tokenizer._chat_template if is_wrapper else None
    code = [*bases, render] if render else bases
    packages = {(c.__module__ or "").partition(".")[0] for c in code}
    if not isinstance(backend, Tokenizer) or not packages <= _KNOWN_PACKAGES:
        return None
    # The first call clears what truncation and padding the backend came with.
    raw([""], add_special_tokens=False)
    parts = {
        "classes": [f"{c.__module__}.{c.__qualname__}" for c in code],
        "versions": [__version__, *map(version, ("transformers", "tokenizers"))],
        "jinja": version("jinja2"),
        "templates": raw.chat_template or "",
        "renderer": render and inspect.getsource(sys.modules[render.__module__]),
        "thinking": is_wrapper and [tokenizer.has_thinking, tokenizer._thinking_kwarg],
        "special": [raw.special_tokens_map, raw.all_special_ids],
        # Of the model's configuration.
        "ends": is_wrapper and sorted(tokenizer.eos_token_ids),
        "split": getattr(raw, "split_special_tokens", None),
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return digest(text, backend.to_str())


def _arrays(name: str, columns: TokenColumns, notes: Mapping[str, Any]) -> list:
    """What a file holds: its head as JSON, and the columns."""
    head = {
        "name": name,
        "notes": notes,
        "places": columns.places.tolist(),
        "kind_names": columns.kind_names,
        "values": list(columns.values),
        "group": columns.group,
    }
    text = np.frombuffer(json.dumps(head).encode(), np.uint8)
    fixed = [getattr(columns, name) for name in _ARRAYS]
    return list(map(np.ascontiguousarray, [text, *fixed, *columns.values.values()]))


def _write(name: str, arrays: list[np.ndarray]) -> None:
    """Write arrays as one .npy after the other, and a checksum of it all."""
    with open(name, "w+b") as file:
        for array in arrays:
            np.save(file, array)
            file.write(bytes(-file.tell() % _ALIGNMENT))
        file.seek(0)
        file.write(file_digest(file, blake2b).digest())


def _map(path: Path) -> Iterator[np.ndarray]:
    """Map the arrays of a file."""
    data = np.memmap(path, mode="r").view(np.ndarray)
    end = len(data) - blake2b().digest_size
    if blake2b(data[:end]).digest() != data[end:].tobytes():
        raise ValueError("The checksum is wrong.")
    with open(path, "rb") as file:
        while file.tell() < end:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
            stop = start + math.prod(shape) * dtype.itemsize
            yield data[start:stop].view(dtype).reshape(shape)
            file.seek(stop + -stop % _ALIGNMENT)


def _read(path: Path) -> tuple[TokenColumns, dict[str, Any]]:
    text, *arrays = _map(path)
    head = json.loads(text.tobytes())
    if head["name"] != path.stem:
        raise ValueError("The file has another file's name.")
    columns = TokenColumns(
        **dict(zip(_ARRAYS, arrays)),
        places=np.array(head["places"], dtype=object),
        kind_names=tuple(map(tuple, head["kind_names"])),
        values=dict(zip(head["values"], arrays[len(_ARRAYS) :], strict=True)),
        group=head["group"],
    )
    return columns, head["notes"]


KEEPERS.append(TokenCache)
