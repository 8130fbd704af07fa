# Copyright © 2026 MLX Contributors

"""A name for raw rows, which follows from what they hold and where they lie."""

import pickle
from collections.abc import Sequence
from typing import Any

from ..digest import digest, file_digest
from .sources import FileRows, LocatedRows


def rows_fingerprint(rows: Sequence[Any]) -> str | None:
    """Hash the content and the places of raw rows."""
    if isinstance(rows, FileRows):
        return _files_fingerprint(rows)
    if isinstance(rows, LocatedRows):
        found = rows_fingerprint(rows.rows)
        return found and digest(rows.name, found)
    if isinstance(found := getattr(rows, "_fingerprint", None), str):
        return digest("datasets", found)
    # Rows hold anything that Python knows; pickle tells all of it apart.
    try:
        locate = getattr(rows, "location", int)
        return digest(pickle.dumps((locate(i), rows[i]), 4) for i in range(len(rows)))
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError):
        return None


def _files_fingerprint(rows: FileRows) -> str | None:
    """Hash the files' names and bytes, without reading rows."""
    try:
        if rows.is_read:
            digests = rows.digests()
        elif all(path.is_file() for path in rows.paths):
            digests = [file_digest(path) for path in rows.paths]
        else:
            return None
    except OSError:
        return None
    # The names show up in places, and tell how to read the bytes.
    return digest([path.name for path in rows.paths], digests)
