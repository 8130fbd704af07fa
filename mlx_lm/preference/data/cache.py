# Copyright © 2026 MLX Contributors

"""
Token ids of large preference sets, kept on disk between runs.

A file is named by what went into it: the rows, the tokenizer with its chat template,
the options, and the code that makes pairs of rows. Anything that differs makes
another name, so a file is never out of date. Files are mapped, not read.
"""

import inspect
import json
import mmap
import os
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ... import tokenizer_utils
from ..._version import __version__
from ...cli_ui import rprint
from ...tokenizer_utils import TokenizerWrapper
from ..files import replace_file
from . import messages as preference_messages
from . import pairs as preference_rows
from . import rankings as labelled_rows
from . import table as token_columns
from . import tokenize as row_tokens
from . import tokenizer as preference_tokens
from .table import OF_PAIRS, TokenColumns

FORMAT = b"mlxtok02"
# Fewer rows are tokenized in a second or two.
MIN_ROWS = 2000
# The folder's size, in bytes. The files used longest ago go first.
MAX_BYTES = 20 * 2**30
_ALIGNMENT = 64
# Places are texts, and stand in the file's head.
_ARRAYS = ("ids", *(name for name in OF_PAIRS if name != "places"))
# Other packages' tokenizers may change without a sign.
_KNOWN_PACKAGES = {"transformers", "mlx_lm", "builtins"}
_CODE = (
    tokenizer_utils,
    labelled_rows,
    preference_messages,
    preference_rows,
    preference_tokens,
    row_tokens,
    token_columns,
)
# What is finer than a day.
_CLOCK = re.compile("%-?[^-aAbBdDeFhjmuwxyYGUVW%]")
_STRFTIME = re.compile(r"strftime_now\(\s*(?:'([^']*)'|\"([^\"]*)\")")


class TokenCache:
    """The files of one tokenizer with some options, in one folder."""

    def __init__(
        self, folder: str | Path, tokenizer: Any, options: Mapping[str, Any]
    ) -> None:
        self._folder = Path(folder).expanduser()
        self._tokenizer = tokenizer
        self._options = dict(options)
        self._day = datetime.now().date()

    def load(self, rows: Sequence[Any]) -> tuple[TokenColumns, dict[str, Any]] | None:
        """Find the tokens of some rows. Damaged files are ignored with a warning."""
        data = rows_fingerprint(rows) if self._folder.is_dir() else None
        # Hashing a large vocabulary takes a while: not for rows never met.
        if not data or not any(self._folder.glob(f"{data}-*")):
            return None
        path = self._path(data)
        if path is None or not path.exists():
            return None
        try:
            result = _read(path, path.stem)
        except (OSError, ValueError, KeyError, TypeError):
            rprint(f"[WARNING] Ignoring {path}, which is damaged: tokenizing again.")
            return None
        try:
            os.utime(path)
        except OSError:
            pass  # The folder may belong to somebody else.
        return result

    def save(
        self, rows: Sequence[Any], columns: TokenColumns, notes: Mapping[str, Any]
    ) -> None:
        """Keep the tokens of some rows. A full disk costs no more than a warning."""
        # Over midnight, a template may have written two dates.
        is_same_day = self._day == datetime.now().date()
        worth = is_same_day and len(columns) and len(rows) > MIN_ROWS
        data = rows_fingerprint(rows) if worth else None
        path = self._path(data) if data else None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            chunks = _serialize(path.stem, columns, notes)
            replace_file(path, lambda name: _write(name, chunks))
            _drop_oldest(path)
        except OSError as e:
            reason = e.strerror or e
            rprint(f"[WARNING] Can't keep the token ids in {path.parent}: {reason}.")

    def _path(self, data: str) -> Path | None:
        if not self._settings:
            return None
        return self._folder / f"{data}-{self._settings}.tokens"

    @cached_property
    def _settings(self) -> str | None:
        tokenizer = tokenizer_fingerprint(self._tokenizer)
        if tokenizer is None:
            return None
        try:
            code = [inspect.getsource(module) for module in _CODE]
        except OSError:
            return None
        parts = [FORMAT.decode(), sys.byteorder, tokenizer, self._options, code]
        return _digest(json.dumps(parts, sort_keys=True).encode())


def _digest(*parts: Any) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def rows_fingerprint(rows: Sequence[Any]) -> str | None:
    """Hash the content and the places of raw rows."""
    own = getattr(rows, "fingerprint", None)
    if callable(own):
        return own()
    if isinstance(found := getattr(rows, "_fingerprint", None), str):
        return _digest(b"datasets ", found.encode())
    # Rows hold anything that Python knows; pickle tells all of it apart.
    try:
        locate = getattr(rows, "location", int)
        return _digest(
            *(pickle.dumps((locate(i), rows[i]), 4) for i in range(len(rows)))
        )
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError):
        return None


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
    templates = raw.chat_template or ""
    parts = {
        "classes": [f"{c.__module__}.{c.__qualname__}" for c in code],
        "versions": [__version__, *map(version, ("transformers", "tokenizers"))],
        "jinja": version("jinja2"),
        "templates": templates,
        "dates": _dates(json.dumps(templates)),
        "renderer": render and inspect.getsource(sys.modules[render.__module__]),
        "thinking": is_wrapper and [tokenizer.has_thinking, tokenizer._thinking_kwarg],
        "special": [raw.special_tokens_map, raw.all_special_ids],
        "split": getattr(raw, "split_special_tokens", None),
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return _digest(text.encode(), backend.to_str().encode())


def _dates(templates: str) -> list[str]:
    """Today, as the templates write it: some put the date into every chat."""
    now = datetime.now()
    found = [a or b for a, b in _STRFTIME.findall(templates.replace('\\"', '"'))]
    known = len(found) == templates.count("strftime_now(")
    if not known or any(map(_CLOCK.search, found)):
        return [now.isoformat()]  # Never the same again.
    return [now.strftime(format) for format in found]


def _serialize(
    name: str, columns: TokenColumns, notes: Mapping[str, Any]
) -> list[bytes | memoryview]:
    """The file: format, checksum of the rest, size of the head, head, arrays."""
    parts = [*(getattr(columns, name) for name in _ARRAYS), *columns.values.values()]
    arrays = [np.ascontiguousarray(array) for array in parts]
    head = json.dumps(
        {
            "name": name,
            "notes": notes,
            "places": columns.places.tolist(),
            "kind_names": columns.kind_names,
            "values": list(columns.values),
            "group": columns.group,
            "arrays": [(array.dtype.str, array.shape) for array in arrays],
        }
    ).encode()
    head += b" " * (-(len(head) + 48) % _ALIGNMENT)
    chunks: list[bytes | memoryview] = [len(head).to_bytes(8, "little"), head]
    for array in arrays:
        chunks += [memoryview(array).cast("B"), bytes(-array.nbytes % _ALIGNMENT)]
    checksum = blake2b(digest_size=32)
    for chunk in chunks:
        checksum.update(chunk)
    return [FORMAT, checksum.digest(), *chunks]


def _write(name: str, chunks: list[bytes | memoryview]) -> None:
    with open(name, "wb") as file:
        file.writelines(chunks)


def _read(path: Path, name: str) -> tuple[TokenColumns, dict[str, Any]]:
    with open(path, "rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if data[:8] != FORMAT or blake2b(data[40:], digest_size=32).digest() != data[8:40]:
        raise ValueError("The checksum is wrong.")
    offset = 48 + int.from_bytes(data[40:48], "little")
    head = json.loads(bytes(data[48:offset]))
    if head["name"] != name:
        raise ValueError("The file has another file's name.")
    arrays = {}
    names = [*_ARRAYS, *head["values"]]
    for column, (dtype, shape) in zip(names, head["arrays"], strict=True):
        size = int(np.prod(shape))
        array = np.frombuffer(data, np.dtype(dtype), size, offset)
        arrays[column] = array.reshape(shape)
        offset += array.nbytes + -array.nbytes % _ALIGNMENT
    places = np.empty(len(head["places"]), dtype=object)
    places[:] = head["places"]
    kind_names = tuple((shape, format) for shape, format in head["kind_names"])
    values = {name: arrays.pop(name) for name in head["values"]}
    columns = TokenColumns(
        **arrays,
        places=places,
        kind_names=kind_names,
        values=values,
        group=head["group"],
    )
    return columns, head["notes"]


def _drop_oldest(newest: Path) -> None:
    """Delete the files used longest ago until the folder is small enough."""
    files = []
    # What a killed run left half written counts, and goes in its turn.
    for path in newest.parent.glob("*.tokens"):
        try:
            stat = path.stat()
        except OSError:
            continue  # Another run deleted it.
        files.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= MAX_BYTES:
            return
        if path != newest:
            path.unlink(missing_ok=True)
            total -= size
