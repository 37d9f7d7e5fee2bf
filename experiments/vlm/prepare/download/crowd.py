"""Many URLs at once, of several shards, and an end without loss.

At most `size` URLs are on their way (asking, or waiting for their host), so memory does not grow with the shards. To stop is
to ask for nothing new and to wait for the answers on the wire: they are journalled like any other.
"""

import asyncio
from collections.abc import Callable, Iterable

from experiments.vlm.prepare.download.fetch import Failed, Fetcher
from experiments.vlm.prepare.download.journal import Journal
from experiments.vlm.prepare.stop import Stopped


class Crowd:
    def __init__(self, fetcher: Fetcher, size: int) -> None:
        self.fetcher = fetcher
        self._window = asyncio.Semaphore(size)
        self._tasks: set[asyncio.Task] = set()

    async def fetch_all(self, urls: Iterable[str], journal: Journal, tell: Callable[[str], None]) -> None:
        """Brings every url into the journal and calls `tell(url)` after each. Raises Stopped."""
        async with asyncio.TaskGroup() as group:
            for url in urls:
                await self._window.acquire()
                if self.fetcher.stopping:
                    self._window.release()
                    break
                task = group.create_task(self._fetch(url, journal, tell))
                self._tasks.add(task)
                task.add_done_callback(self._leave)
        if self.fetcher.stopping:
            raise Stopped

    def stop(self) -> None:
        """From the loop's thread. Who only waits goes home; who is on the wire finishes."""
        self.fetcher.stopping = True
        for task in self._tasks - self.fetcher.in_flight:
            task.cancel()

    async def _fetch(self, url: str, journal: Journal, tell: Callable[[str], None]) -> None:
        # Nothing is awaited between the last byte and the journal.
        try:
            journal.arrived(url, await self.fetcher.fetch(url))
        except Failed as failure:
            journal.failed(url, failure.reason, failure.detail)
        except Stopped:
            return
        tell(url)

    def _leave(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        self._window.release()
