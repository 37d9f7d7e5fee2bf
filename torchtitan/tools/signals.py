"""SIGTERM and SIGINT become a wish to stop, which the trainer grants after the step it is in, or end at once
what can be gone on with.
"""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

WATCHED = (signal.SIGTERM, signal.SIGINT)
Handler = Callable[[int, FrameType | None], object]


class StopAsked(Exception):
    """A signal came while ranks wait for their storage or evaluate: the trainer stops that, and saves."""


class Ended(KeyboardInterrupt):
    """A signal ended work whose results so far are kept; `code`: for the shell."""

    def __init__(self, number: signal.Signals):
        super().__init__(f"stopped by {number.name}; the same command goes on")
        self.code = exit_code(number)


def resumable() -> AbstractContextManager[None]:
    """Within, either signal raises Ended."""
    return raising(Ended, WATCHED)


def unwinding() -> AbstractContextManager[None]:
    """Within, SIGTERM raises SystemExit, so that processes which were started here end too."""
    return raising(lambda number: SystemExit(exit_code(number)), [signal.SIGTERM])


@contextmanager
def raising(
    error: Callable[[signal.Signals], BaseException], numbers: Sequence[signal.Signals]
) -> Iterator[None]:
    """Within, these signals raise what `error` makes of them. Ignored ones, as nohup has them, stay so."""

    def end(number: int, frame: FrameType | None) -> None:
        raise error(signal.Signals(number))

    with handled([number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN], end):
        yield


@contextmanager
def handled(numbers: Iterable[int], handler: Handler) -> Iterator[None]:
    """Within, `handler` is called for these signals; afterwards what was called before."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


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
