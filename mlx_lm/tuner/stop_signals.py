# Copyright © 2026 MLX Contributors

"""Ending a run politely: the step is finished and saved first."""

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """
    Remember SIGINT and SIGTERM while a run is on; a second one ends it at once.

    Args:
        patient (bool): Ignore a second one. Of several ranks each gets that of the
            terminal and then the launcher's. Default: ``False``.

    Example:
        >>> with StopSignals() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     stop.exit_code
        143
    """

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.exit_code = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        # Handlers belong to the main thread.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.patient and error is not None:
            # Another rank may be gone: this one still has to say how to go on.
            self.ignore()
        self._restore()

    def _restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = 128 + number
        if self.patient:
            self.ignore()
        else:
            self._restore()

    def ignore(self) -> None:
        """
        Let no signal end this process any more: it ends by itself.

        Example:
            >>> stop = StopSignals()
            >>> stop.ignore()  # nothing to do where none is remembered
        """
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        self._before = {}
