# Copyright © 2026 MLX Contributors

"""Chat templates that run too long or take too much memory, ended."""

from collections.abc import Iterator
from contextlib import contextmanager

from .bounded import TooSlow, bounded
from .content import RowFault
from .render import BOUNDS

# Seconds of processor time for one row, and rows that may take so long.
LONGEST, MOST_SLOW = 10.0, 3
TOO_SLOW = "chat template runs too long"
# Bytes that it may take for one row.
MOST_MEMORY = 10**9


class Bounded:
    """Bounds for the template of one tokenizer."""

    def __init__(self) -> None:
        self._slow = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Raise a fault where it takes more."""
        if self._slow >= MOST_SLOW:
            raise RowFault(TOO_SLOW)
        try:
            with bounded(LONGEST, MOST_MEMORY):
                yield
        except MemoryError as e:
            what = f"more than {MOST_MEMORY / 1e9:g} GB for one row"
            raise RowFault("chat template takes too much memory", what) from e
        except TooSlow as e:
            self._slow += 1
            raise RowFault(TOO_SLOW, f"stopped after {LONGEST:g} s") from e


BOUNDS.append(Bounded)
