"""Images by their address, for records that hold URLs.

The client is that of data preparation (client.py): http(s) only, a few redirects at most, no private
addresses. Here an image has a few seconds in all, and one try.

The first outcome is the outcome. Bytes are kept in the file cache, and notes on addresses that did not answer
in its folder `failed`, so a sample that is read again, by another rank or a resumed run, is the same. This
holds as long as they share that folder, file locks in it work, and nothing had to be thrown out of it. To ask
again what failed, delete `failed`, or change data.url_timeout_s.

For more than a trial, fetch beforehand: scripts/prepare_data.py.
"""

import asyncio
import functools
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.vlm.config import Data
from experiments.vlm.data.rejects import REASONS, Rejected
from experiments.vlm.data.storage.client import Client, Failed, Limits
from experiments.vlm.data.storage.file_cache import FileCache, file_cache
from experiments.vlm.data.storage.hosts import Gate, Hosts

MAX_BYTES = 64 << 20
THREADS = 16
FAILED_BYTES = 64 << 20  # of notes about addresses that failed; those that were met longest ago go first
USER_AGENT = "torchtitan-vlm/0.1 (training data)"


class Fetcher:
    """Thread-safe; one a process and configuration."""

    def __init__(self, cache: FileCache, timeout_s: float, allow_private: bool):
        self.cache = cache
        self.timeout_s = timeout_s
        self.gate = Gate(allow_private)
        self.failures = FileCache(cache.folder / "failed", FAILED_BYTES)
        # reason and detail; the exceptions would keep their frames
        self._failed: dict[str, tuple[str, str]] = {}
        self._is_usable = False  # the cache, as far as it was asked
        self._pool: ThreadPoolExecutor | None = None
        self._running: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def fetch(self, url: str) -> bytes:
        """The bytes behind an address, from the cache if they are there. Raises Rejected, and ConfigError
        where nothing can be kept there.
        """
        if url in self._failed:
            raise Rejected(*self._failed[url])
        if not self._is_usable:
            self.cache.require_usable()
            self._is_usable = True
        try:
            return self.cache.get(url, lambda path: self._write(url, path), ".image").read_bytes()
        except Rejected as rejected:
            self._failed[url] = rejected.reason, rejected.detail
            raise
        except FileNotFoundError:  # thrown out of the cache in between
            return self._download(url)

    def fetch_ahead(self, urls: Iterable[str]) -> None:
        """Fetch several at one time: a document waits for its slowest image, not for the sum of them."""
        waiting = [url for url in dict.fromkeys(urls) if url not in self._failed]
        if len(waiting) < 2:
            return
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(THREADS, thread_name_prefix="fetch")
        list(self._pool.map(self._fetched, waiting))

    def _fetched(self, url: str) -> bool:
        try:
            self.fetch(url)
        except Rejected:
            return False
        return True

    def _write(self, url: str, path: Path) -> None:
        """Called while no other process asks for this address: those that waited find the outcome."""
        origin = f"{self.timeout_s} {url}"
        if detail := self.failures.noted(origin):
            raise Rejected("image_fetch", f"{detail} (remembered in {self.failures.folder})")
        try:
            path.write_bytes(self._download(url))
        except Rejected as rejected:
            # What is refused without asking, for what it is or where it leads, is refused again all the same.
            if rejected.reason == "image_fetch":
                self.failures.note(origin, rejected.detail)
            raise

    def _download(self, url: str) -> bytes:
        """Raises Rejected for one of few reasons, since steps count each; the detail has the client's."""
        try:
            return asyncio.run_coroutine_threadsafe(self._asked(url), self._loop()).result()
        except Failed as failed:
            refused = failed.reason in ("bad_url", "private_address")
            reason = (
                "image_address" if refused else failed.reason if failed.reason in REASONS else "image_fetch"
            )
            detail = ", ".join(filter(None, (failed.reason, failed.detail)))
            raise Rejected(reason, f"{url[:200]}: {detail}") from failed
        except TimeoutError as error:
            raise Rejected("image_fetch", f"{url[:200]}: timeout") from error

    async def _asked(self, url: str) -> bytes:
        """In the loop's thread. The time limit is for the sum of everything."""
        limits = Limits(self.timeout_s, self.timeout_s, MAX_BYTES, retries=0, keep_alive=False)
        async with (
            Client(limits, self.gate, Hosts(THREADS, 0.0), THREADS, USER_AGENT) as client,
            asyncio.timeout(self.timeout_s),
        ):
            return await client.fetch(url)

    def _loop(self) -> asyncio.AbstractEventLoop:
        """One that runs in a thread of its own, which ends with the process."""
        with self._lock:
            if self._running is None:
                self._running = asyncio.new_event_loop()
                threading.Thread(target=self._running.run_forever, name="fetch", daemon=True).start()
            return self._running


def about_failures(data: Data) -> str:
    """For people, once an address did not answer: what stays the same, and what does not."""
    folder = file_cache(data).folder
    return (
        "images by address: what did not answer stays left out for all ranks and later runs that share "
        f"{folder}; batches may differ where machines do not share it, or where data.cache_gb is too small "
        f"for all images; delete {folder / 'failed'} to ask again"
    )


def make_fetcher(data: Data) -> Fetcher:
    """One a process, so that it knows what failed before; a forked worker has its own threads."""
    return _make_fetcher(os.getpid(), file_cache(data), data.url_timeout_s, data.allow_private_urls)


@functools.cache
def _make_fetcher(process: int, cache: FileCache, timeout_s: float, allow_private: bool) -> Fetcher:
    return Fetcher(cache, timeout_s, allow_private)
