# Copyright © 2026 MLX Contributors

"""Texts that a user writes, such as prompts."""

import codecs
from pathlib import Path

from ..errors import InputError
from ..files import read_plain

# Bytes.
MOST_TEXT = 64 * 10**6


def read_text(path: str | Path, what: str, advice: str) -> str:
    """Read a text that a user wrote: UTF-8, or the UTF-16 that editors of Windows write."""
    try:
        raw = read_plain(path, MOST_TEXT)
        is_wide = raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        text = raw.decode("utf-16" if is_wide else "utf-8-sig")
        if "\0" in text:
            raise ValueError("a NUL")
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"{what} {path} can't be read: {reason}. {advice}") from e
    return text


def read_lines_of(path: str | Path, what: str, advice: str) -> list[tuple[int, str]]:
    """The lines of such a text that are not blank, with their numbers."""
    # Not splitlines: a prompt, and JSON, may hold other ends of lines.
    lines = enumerate(read_text(path, what, advice).split("\n"), 1)
    return [(i, line.rstrip("\r")) for i, line in lines if line.strip()]
