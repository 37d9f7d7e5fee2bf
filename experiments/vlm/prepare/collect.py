"""The images of shards: fetched into a journal, then judged and encoded into one file (images.py).

What was fetched lies in the journal until its shard is written, so a process that dies here costs only
computing time.
"""

import asyncio
import ipaddress
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from experiments.vlm.data.formats.image_values import is_address, name_of
from experiments.vlm.data.storage.client import Client, Failed, Limits, Stopped
from experiments.vlm.data.storage.hosts import Gate, Hosts
from experiments.vlm.prepare.folder import read_array
from experiments.vlm.prepare.images import images_of, looks_whole, write_images
from experiments.vlm.prepare.journal import Journal
from experiments.vlm.prepare.options import Options
from experiments.vlm.prepare.progress import ShardProgress, StageProgress
from experiments.vlm.prepare.shard_plan import PrepareJob
from experiments.vlm.prepare.stop import Stop

SHARDS_AT_ONCE = 4  # while one is judged, or waits for a slow host, the others fetch
FETCHES_PER_REQUEST = 8  # URLs under way for each that may be on the wire: the others wait for their hosts


class Fetches:
    """Many URLs at once, of several shards, and an end without loss.

    At most `size` URLs are on their way (asking, or waiting for their host), so memory does not grow with the
    shards. To stop is to ask for nothing new and to wait for the answers on the wire: they are journalled
    like any other.
    """

    def __init__(self, client: Client, size: int) -> None:
        self.client = client
        self._window = asyncio.Semaphore(size)
        self._tasks: set[asyncio.Task] = set()

    async def fetch_all(self, urls: Iterable[str], journal: Journal, on_done: Callable[[str], None]) -> None:
        """Brings every url into the journal and calls `on_done(url)` after each. Raises Stopped."""
        async with asyncio.TaskGroup() as group:
            for url in urls:
                await self._window.acquire()
                if self.client.stopping:
                    self._window.release()
                    break
                task = group.create_task(self._fetch(url, journal, on_done))
                self._tasks.add(task)
                task.add_done_callback(self._leave)
        if self.client.stopping:
            raise Stopped

    def stop(self) -> None:
        """Stop, from the loop's thread: fetches that only wait are cancelled; those on the wire finish."""
        self.client.stopping = True
        for task in self._tasks - self.client.in_flight:
            task.cancel()

    async def _fetch(self, url: str, journal: Journal, on_done: Callable[[str], None]) -> None:
        # Nothing is awaited between the last byte and the journal.
        try:
            journal.arrived(url, await self.client.fetch(url))
        except Failed as failure:
            journal.failed(url, failure.reason, failure.detail)
        except Stopped:
            return
        on_done(url)

    def _leave(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        self._window.release()


@dataclass(frozen=True)
class Tools:
    """What the shards of one process share."""

    fetches: Fetches
    pool: ThreadPoolExecutor
    turns: asyncio.Semaphore
    progress: StageProgress
    stop: Stop


def collect(job: PrepareJob, numbers: Iterable[int], progress: StageProgress, stop: Stop) -> None:
    """Collect the images of these shards. Raises Stopped once all that came is in the journals."""
    asyncio.run(collect_all(job, numbers, progress, stop))


async def collect_all(job: PrepareJob, numbers: Iterable[int], progress: StageProgress, stop: Stop) -> None:
    """A few shards at a time, with one client for all. Raises the first error once every shard has ended."""
    async with make_client(job.options) as client:
        fetches = Fetches(client, FETCHES_PER_REQUEST * job.options.concurrency)
        with ThreadPoolExecutor(job.options.threads or None) as pool, stop.calling(fetches.stop):
            tools = Tools(fetches, pool, asyncio.Semaphore(SHARDS_AT_ONCE), progress, stop)
            results = await asyncio.gather(
                *(collect_shard(job, number, tools) for number in numbers), return_exceptions=True
            )
    # A fault of one shard stops the others, whose Stopped then says less than the fault.
    for error in sorted(
        (result for result in results if result is not None), key=lambda error: isinstance(error, Stopped)
    ):
        raise error


async def collect_shard(job: PrepareJob, number: int, tools: Tools) -> None:
    """Fetch what the shard lacks, then judge and encode. What is there is not made again."""
    async with tools.turns:
        counted = ShardProgress(tools.progress)
        try:
            tools.stop.check()
            if not job.folder.image_index(number).exists():
                with Journal(job.folder.journal(number)) as journal:  # it survives a stop
                    await fetch_missing(job, number, journal, tools.fetches, counted)
                    await asyncio.to_thread(
                        write_images, job, number, journal, tools.pool, counted, tools.stop
                    )
        except Exception:
            tools.fetches.stop()
            raise
        counted.fill(len(read_array(job.folder.hashes("content", number), np.uint64)))


async def fetch_missing(
    job: PrepareJob, number: int, journal: Journal, fetches: Fetches, counted: ShardProgress
) -> None:
    """Into the journal, what is not there yet. Raises Stopped."""
    if not read_array(job.folder.hashes("urls", number), np.uint64).any():
        return
    urls = await asyncio.to_thread(list_addresses, job, number)
    missing = [url for url in urls if url not in journal]
    counted.advance(len(urls) - len(missing), before=True)

    def on_done(url: str) -> None:
        outcome = journal.outcomes[url]
        counted.advance(1, failed=int(bool(outcome.reason)), size=outcome.length)

    await fetches.fetch_all(missing, journal, on_done)


def list_addresses(job: PrepareJob, number: int) -> list[str]:
    """The addresses of a shard's images, each once, but for those that an earlier image of the input has."""
    names = (name_of(image.value) for image, repeated in images_of(job, number) if not repeated)
    return list(dict.fromkeys(name for name in names if is_address(name)))


def make_client(options: Options) -> Client:
    """A client, to be entered in the event loop that it works in."""
    networks = tuple(ipaddress.ip_network(network) for network in options.allow_networks)
    return Client(
        Limits(
            timeout_s=options.timeout_s,
            read_timeout_s=options.read_timeout_s,
            max_bytes=options.max_bytes,
            retries=options.retries,
            max_retry_after_s=options.max_retry_after_s,
        ),
        Gate(options.allow_private, networks),
        Hosts(options.max_per_host, options.host_delay_s),
        options.concurrency,
        options.user_agent,
        looks_whole,
    )
