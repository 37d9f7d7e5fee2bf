"""SIGTERM and SIGINT become a wish to stop, which the trainer grants after the step it is in."""

import signal
from types import FrameType

WATCHED = (signal.SIGTERM, signal.SIGINT)


def exit_code(stopped_by: signal.Signals | None) -> int:
    """As a shell reports a process that a signal ended.

    With 0 a loop around the run would start the next one.
    """
    return 0 if stopped_by is None else 128 + stopped_by


class StopSignals:
    """While open, a signal is remembered; a second SIGINT interrupts at once, for a person who means it."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before = {number: signal.signal(number, self._remember) for number in WATCHED}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def close(self) -> None:
        """Gives the signals back to who had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
