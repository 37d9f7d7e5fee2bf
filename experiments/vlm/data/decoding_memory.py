"""How much memory the threads of a process may take at a time for what is large."""

import contextlib
import threading
from collections.abc import Iterator


class DecodingMemory:
    """`limit_bytes` that threads share. One that wants more than that waits until it is alone, and those that
    come after it wait behind it.
    """

    def __init__(self, limit_bytes: int):
        self._limit = limit_bytes
        self._held = 0
        self._turn = threading.Lock()
        self._freed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, wanted_bytes: int) -> Iterator[None]:
        """Waits until there is room for so many bytes, and keeps it inside the `with`."""
        wanted = min(wanted_bytes, self._limit)
        with self._turn, self._freed:
            self._freed.wait_for(lambda: self._held + wanted <= self._limit)
            self._held += wanted
        try:
            yield
        finally:
            with self._freed:
                self._held -= wanted
                self._freed.notify_all()
