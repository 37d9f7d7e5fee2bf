"""What took work to make and is soon wanted again, by all threads of a process, within a bound of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Value = TypeVar("Value")
Key = tuple[int, int]  # of an opened file, and of something in it


class LRUCache(Generic[Value]):
    """Values by their keys, the longest unused thrown out while all together take more than `limit_bytes`,
    and there is more than one. Threads that want the same one at a time wait for the first to make it.
    """

    def __init__(self, limit_bytes: int):
        self._limit = limit_bytes
        self._values: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._bytes = 0
        self._making: dict[Key, Future[Value]] = {}
        # A file may be closed, and so forgotten, by a collection of garbage inside any of these.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Key, make: Callable[[], tuple[Value, int]]) -> Value:
        """The value of that key; where it is not kept, `make` gives it and its bytes, or raises."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
            others = self._making.get(key)
            if others is None:
                made = self._making[key] = Future()
        return others.result() if others is not None else self._make(key, make, made)

    def forget(self, file: int) -> None:
        """Throw out what is of a file that was closed."""
        with self._lock:
            for key in list(self._values):
                if key[0] == file and key in self._values:
                    self._bytes -= self._values.pop(key)[1]

    def _make(self, key: Key, make: Callable[[], tuple[Value, int]], made: Future[Value]) -> Value:
        try:
            value, size = make()
            with self._lock:
                self._values[key] = value, size
                self._bytes += size
                while len(self._values) > 1 and self._bytes > self._limit:
                    self._bytes -= self._values.popitem(last=False)[1][1]
            made.set_result(value)
        except BaseException as error:
            made.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._making[key]
        return value
