# Copyright © 2026 MLX Contributors

"""Programs of others, such as chat templates, held to so much time and memory."""

import ctypes
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

with suppress(ImportError):
    # There is none on Windows.
    import resource

_SIGNAL = getattr(signal, "SIGVTALRM", None)
_lock = threading.Lock()
_limited: list[tuple[int, int]] = []


class TooSlow(BaseException):
    """Raised inside a template, which may catch an Exception."""


@contextmanager
def bounded(seconds: float, size: int) -> Iterator[None]:
    """End what runs longer, or asks for more memory: ``TooSlow`` or ``MemoryError``."""
    with _bounded_memory(size), _bounded_time(seconds):
        yield


@contextmanager
def _bounded_memory(size: int) -> Iterator[None]:
    """Give the process so many bytes more, where the system keeps to such a limit."""
    # Reading it takes longer than most templates do.
    if (used := _used(int(10 * time.monotonic()))) is None:
        yield
        return
    with _lock:
        # A limit is the whole process's: of several threads the first sets it.
        _limited.append(resource.getrlimit(resource.RLIMIT_AS))
        soft, hard = before = _limited[0]
        if len(_limited) == 1:
            limits = [used + size] + [x for x in before if x >= 0]
            resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        with _lock:
            _limited.pop()
            if not _limited:
                resource.setrlimit(resource.RLIMIT_AS, before)


@lru_cache(maxsize=1)
def _used(_: int) -> int | None:
    """The bytes of this process's address space; macOS bounds none."""
    with suppress(OSError, NameError, ValueError):
        pages = Path("/proc/self/statm").read_text().split()[0]
        return int(pages) * resource.getpagesize()
    return None


@contextmanager
def _bounded_time(seconds: float) -> Iterator[None]:
    """End what runs longer: than so much processor time in the main thread, else time."""
    is_main = threading.current_thread() is threading.main_thread()
    if _SIGNAL is None or not is_main:
        with _watched(seconds):
            yield
        return

    def stop(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(_SIGNAL, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(_SIGNAL, before)


@contextmanager
def _watched(seconds: float) -> Iterator[None]:
    """The same by another thread, where no signal arrives."""
    thread = ctypes.c_ulong(threading.get_ident())
    lock, is_done = threading.Lock(), False
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def stop():
        with lock:
            if not is_done:
                raise_in(thread, ctypes.py_object(TooSlow))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            is_done = True
        # One that is on its way arrives here. Taken back, Python would look for it for
        # ever, and a traced function never begin.
        time.sleep(0)
