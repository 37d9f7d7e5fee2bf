"""The wish to end: set by a signal or the parent's death, seen by loops and by an event loop alike."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from experiments.vlm.data.storage.client import Stopped


class Stop:
    """Whether the run is to end. True once it was asked to."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._wake: Callable[[], object] | None = None

    def __bool__(self) -> bool:
        return self._event.is_set()

    def ask(self) -> None:
        """Ask for the end, from any thread or signal handler, as often as one likes."""
        self._event.set()
        if self._wake:
            self._wake()

    def check(self) -> None:
        """Raises Stopped once it was asked to stop."""
        if self:
            raise Stopped

    @contextmanager
    def calling(self, action: Callable[[], object]) -> Iterator[None]:
        """While inside an event loop: `action` is called in it when the run is to end."""
        loop = asyncio.get_running_loop()
        self._wake = lambda: loop.call_soon_threadsafe(action)
        try:
            if self:
                action()
            yield
        finally:
            self._wake = None
