# Copyright © 2026 MLX Contributors

"""Ending a run politely: the step is finished and saved first."""

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

# Windows has no terminals that hang up.
HANGUP = getattr(signal, "SIGHUP", None)
# With these batch systems say that the time is nearly over; the last comes each second.
_NAMES = "SIGUSR1", "SIGUSR2", "SIGXCPU"
WARNINGS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
SIGNALS = (signal.SIGINT, signal.SIGTERM, *filter(None, [HANGUP]), *WARNINGS)
REPEATED = (HANGUP, *WARNINGS[-1:])
# Seconds for a step after a signal; other ranks' loss should show within a minute.
PATIENCE = 45.0


class _Guard:
    """Ends a rank that waits, outside Python, for one that is gone."""

    def __init__(self, advice):
        self._advice, self._longest, self._last = advice, 0.0, time.monotonic()
        self._closed = threading.Event()
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        # Python's own handlers wait until MLX returns.
        number = self._writing.fileno()
        self._before = signal.set_wakeup_fd(number, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()

    def beat(self):
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now

    def close(self):
        if not self._closed.is_set():
            self._closed.set()
            signal.set_wakeup_fd(self._before)
            self._writing.close()

    def _watch(self):
        with self._reading:
            while (number := self._reading.recv(1)) and number[0] not in SIGNALS:
                pass
        seen = self._last
        while not self._closed.wait(max(PATIENCE, 2 * self._longest)):
            if self._last == seen:
                text = "Error: Rank lost: the others do not answer. "
                sys.stderr.write(f"{text}{self._advice}\n")
                sys.stderr.flush()
                os._exit(1)
            seen = self._last


class StopSignals:
    """Remember what asks a run to end; a second SIGINT or SIGTERM ends it at once."""

    def __init__(self, patient: bool = False, advice: str = "") -> None:
        self.patient, self.advice = patient, advice
        self._guard: _Guard | None = None
        self.exit_code = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        # Handlers belong to the main thread.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # nohup, which lets a run outlive its terminal.
                if number == HANGUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                # Programs may have a use of their own for them.
                if number in WARNINGS and signal.getsignal(number) != signal.SIG_DFL:
                    continue
                self._before[number] = signal.signal(number, self._remember)
            if self.patient:
                self._guard = _Guard(self.advice)
        return self

    def __exit__(self, *error: object) -> None:
        if self.patient and error[1] is not None:
            # Another rank may be gone: this one still has to say how to go on.
            self.ignore()
        self._close_guard()
        self._leave()

    def _close_guard(self):
        if self._guard is not None:
            self._guard.close()

    def _leave(self, handler=None):
        """Leave the signals to a handler, or to those of before."""
        for number, before in self._before.items():
            signal.signal(number, handler or before)
        self._before = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = 128 + number
        repeated = {k: x for k, x in self._before.items() if k in REPEATED}
        self._leave(signal.SIG_IGN if self.patient else None)
        if not self.patient:
            # A shell and its terminal both tell that they close: one is enough.
            for again in repeated:
                signal.signal(again, signal.SIG_IGN)
            self._before = repeated

    def beat(self) -> None:
        """Tell that the run moves: a step or a batch is done."""
        if self._guard is not None:
            self._guard.beat()

    def ignore(self) -> None:
        """Let no signal end this process any more: it ends by itself."""
        self._close_guard()
        self._leave(signal.SIG_IGN)
