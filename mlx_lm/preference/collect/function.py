# Copyright © 2026 MLX Contributors

"""A Python function as a judge: whatever it does, only a verdict becomes a label."""

import copy
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import InputError
from .labels import NONE
from .verdicts import Verdict, as_verdict

# Seconds for one prompt, and how often in a row a judge may take longer.
LONGEST, MOST_SLOW = 60.0, 3


def find_function(spec: str, longest: float = LONGEST) -> Callable:
    """Load the function that ``FILE.py:NAME`` names."""
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser()
    if not file or not name.isidentifier():
        raise InputError(f"A function judge is function:FILE.py:NAME, got {spec!r}.")
    if not path.is_file():
        raise InputError(f"The judge's file {path} does not exist.")
    module = ModuleType(f"judge_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    # It may import its neighbours, as a script does.
    sys.path.append(str(path.resolve().parent))
    try:
        # Not through a cache: a file may be written twice in a second.
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except (Exception, SystemExit) as e:
        raise InputError(f"Can't load {path}: {_reason(e, path)}") from e
    function = getattr(module, name, None)
    if not callable(function):
        known = [k for k, v in vars(module).items() if callable(v) and k[0] != "_"]
        listed = ", ".join(known) or "none"
        raise InputError(f"{path} has no function {name!r}. It has: {listed}.")
    return careful(function, path, longest)


def careful(
    function: Callable, path: Path | None = None, longest: float = LONGEST
) -> Callable:
    """A judge whose faults and hangs are a verdict of none, with the reason."""
    slow = 0

    def judge(prompt, responses, row):
        nonlocal slow
        # It keeps what it is given to itself.
        given = copy.deepcopy((prompt, list(responses), dict(row)))
        try:
            said = as_verdict(bounded(function, given, longest), len(given[1]))
        except TooSlow:
            slow += 1
            if slow == MOST_SLOW:
                raise InputError(
                    f"The judge took longer than {longest:g} s {slow} times in a row: "
                    "mend it, or allow more with judge_timeout. Its labels so far are "
                    "kept."
                ) from None
            return Verdict(NONE, why=f"no answer in {longest:g} s")
        except KeyboardInterrupt:
            raise
        except BaseException as e:
            why = _reason(e, path)
            if isinstance(e, KeyError):
                why += f"; the prompt's columns: {', '.join(map(str, row)) or 'none'}"
            said = Verdict(NONE, why=why)
        slow = 0
        return said

    return judge


def _reason(error, path):
    """An error in a line, with the line of the judge's file."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if path and Path(f.filename) == path]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}{': ' * bool(text)}{text:.200}{where}"


class TooSlow(BaseException):
    """Raised inside a judge, which may catch an Exception."""


def bounded(function: Callable, given: tuple, seconds: float) -> Any:
    """Call a function, for so long at most."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and hasattr(signal, "SIGALRM"):
        with _alarm(seconds):
            return function(*given)
    found: list[Any] = []
    errors: list[BaseException] = []

    def run():
        try:
            found.append(function(*given))
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not found:
        raise TooSlow
    return found[0]


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    # Again and again: the judge may have caught the first.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
