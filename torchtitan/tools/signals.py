"""SIGTERM and SIGINT become a wish to stop, which the trainer grants after the step it is in."""

import signal
from types import FrameType

WATCHED = (signal.SIGTERM, signal.SIGINT)


class StopAsked(Exception):
    """A signal came while ranks waited for their storage: the run ends before the step they waited for."""


def exit_code(stopped_by: signal.Signals | None) -> int:
    """As a shell reports a process that a signal ended.

    With 0 a loop around the run would start the next one.
    """
    return 0 if stopped_by is None else 128 + stopped_by


class StopSignals:
    """While open, a signal is remembered; a second SIGINT interrupts at once, for a person who means it."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        _open.append(self)
        self._before = {number: signal.signal(number, self._remember) for number in WATCHED}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def close(self) -> None:
        """Gives the signals back to who had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self in _open:
            _open.remove(self)


def stop_asked() -> bool:
    """Whether a signal was received, for those who wait for something and could end it."""
    return any(signals.received is not None for signals in _open)


_open: list[StopSignals] = []
