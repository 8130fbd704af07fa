# Copyright © 2026 MLX Contributors

"""What is printed: plain text, to a reader that may have gone."""

import os
import shlex
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from .. import cli_ui

# A character that a terminal obeys, or that changes the order of those around it.
_OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")


def visible(text: Any, kept: str = "\n") -> str:
    """A text in which all that a terminal or a browser would obey is written out."""
    text = str(text)
    if text.isprintable():
        return text
    # Joiners belong to the letters of some scripts, and to emoji.
    kept += "\u200c\u200d"
    is_obeyed = lambda c: c not in kept and unicodedata.category(c) in _OBEYED
    return "".join(repr(c)[1:-1] if is_obeyed(c) else c for c in text)


def rprint(*texts: Any) -> None:
    """Print plain text, on the first rank."""
    cli_ui.rprint(*map(visible, texts))


def counted(number: int, noun: str) -> str:
    """Put a number before a noun."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def resuming(folder: Any) -> str:
    """The flag that goes on with a run, as a shell reads it."""
    return f"--resume {shlex.quote(str(folder))}"


class _Lasting:
    """A stream that can always be written: what nobody can read is lost, no more."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            known = self._stream.encoding
            plain = text.encode(known, "backslashreplace").decode(known)
            with suppress(OSError):
                self._stream.write(plain)
        except (OSError, ValueError):
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self):
        """Let the rest go nowhere, also what is flushed when the process ends."""
        with suppress(OSError, ValueError):
            number = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def _open_standard_streams():
    """Keep the numbers of streams that are closed: MLX reads no file of number 0, and
    what writes to 1 or 2 would write to a model or an adapter."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free.
            os.open(os.devnull, os.O_RDWR)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Go on when nobody reads any more what is printed: a closed pipe or terminal."""
    _open_standard_streams()
    before = sys.stdout, sys.stderr
    wrap = lambda x: x if x is None or isinstance(x, _Lasting) else _Lasting(x)
    sys.stdout, sys.stderr = map(wrap, before)
    try:
        yield
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        sys.stdout, sys.stderr = before
