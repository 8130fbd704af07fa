# Copyright © 2026 MLX Contributors

"""What a run, or somebody else, has written into its folder."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import read_plain
from ..terminal import rprint


def read_lines(path: str | Path, **kinds: Any) -> list[dict]:
    """Read a file of one JSON object a line, those that have what is needed."""
    if not os.path.lexists(path):
        return []
    # What has no end yet is being written.
    *lines, last = _read(path).split("\n")
    found = [_object(line, kinds) for line in lines if line.strip()]
    if None in found:
        rprint(
            f"[WARNING] {path} is damaged: {found.count(None)} of its lines are left out."
        )
    return [one for one in (*found, _object(last, kinds)) if one is not None]


def _object(line, kinds):
    with suppress(ValueError, RecursionError):
        found = json.loads(line)
        if isinstance(found, dict) and all(
            type(found.get(name)) in types for name, types in kinds.items()
        ):
            return found
    return None


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON file; nothing if there is none, or it is damaged."""
    if not os.path.lexists(path):
        return {}
    text = _read(path)
    with suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(text or "{}"), dict):
            return found
    rprint(f"[WARNING] {path} is damaged: it is left out.")
    return {}


def _read(path):
    try:
        return read_plain(path).decode("utf-8", "replace")
    except OSError as e:
        rprint(f"[WARNING] Can't read {path}: {e.strerror}. It is left out.")
        return ""
