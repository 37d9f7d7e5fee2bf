"""SIGTERM and SIGINT become a wish to stop, which the trainer grants after the step it is in, or end at once
what can be gone on with.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

WATCHED = (signal.SIGTERM, signal.SIGINT)


class StopAsked(Exception):
    """A signal came while ranks waited for their storage: the run ends before the step they waited for."""


class Ended(KeyboardInterrupt):
    """A signal ended work whose results so far are kept; `code`: for the shell."""

    def __init__(self, number: signal.Signals):
        super().__init__(f"stopped by {number.name}; the same command goes on")
        self.code = exit_code(number)


@contextmanager
def resumable() -> Iterator[None]:
    """Within, either signal raises Ended; one that is ignored, as nohup has it, stays so."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(signal.Signals(number))

    heard = [number for number in WATCHED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(stopped_by: signal.Signals | None) -> int:
    """The exit code with which a shell reports a process that a signal ended.

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
        """Restore the handlers of before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self in _open:
            _open.remove(self)


def stop_asked() -> bool:
    """Whether a signal was received, for those who wait for something and could end it."""
    return any(signals.received is not None for signals in _open)


_open: list[StopSignals] = []
