"""One URL to its bytes: redirects, limits and retries. Judges the transfer, never the image.

Only http and https. A redirect is followed by hand, so that each hop has its host's politeness, its scheme
checked and, by `Gate`, its address. The time limit is for a hop as a whole, so a server that sends a byte a
second ends too.
"""

import asyncio
import contextlib
import errno
import random
import socket
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import aiohttp
from yarl import URL

from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.storage.hosts import REFUSED, Gate, Hosts

REDIRECTS = {301, 302, 303, 307, 308}
RETRIED = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524}
MAX_REDIRECTS = 5
MAX_BACKOFF_S = 60.0


@dataclass(frozen=True)
class Limits:
    """How long, how much and how often is tried."""

    timeout_s: float = 30.0  # a whole answer
    read_timeout_s: float = 10.0  # silence while connecting or reading
    max_bytes: int = 32 << 20
    retries: int = 3
    backoff_s: float = 1.0  # doubles with each retry
    max_retry_after_s: float = 120.0  # a host that asks for a longer rest is given up
    keep_alive: bool = True  # ask again on a connection that was good: what fails then wants a retry


class Stopped(Exception):
    """Nothing more is asked, since everything is to end; everything needed to go on is on disk."""


class Failed(Rejected):
    """A URL that could not be fetched. `again`: a later try may succeed, not before `after_s` seconds."""

    def __init__(self, reason: str, detail: str = "", again: bool = False, after_s: float = 0.0) -> None:
        super().__init__(reason, detail)
        self.again, self.after_s = again, after_s


class Client:
    """An HTTP client for many URLs at once. Use as an async context manager.

    `looks_whole(bytes) -> bool` is called only where HTTP does not say: an answer without a length that ends
    when the connection closes looks the same whether the server finished or died.
    """

    def __init__(
        self,
        limits: Limits,
        gate: Gate,
        hosts: Hosts,
        concurrency: int,
        user_agent: str,
        looks_whole: Callable[[bytes], bool] = lambda data: True,
    ) -> None:
        self.limits, self.gate, self.hosts, self.looks_whole = limits, gate, hosts, looks_whole
        self.places = asyncio.Semaphore(concurrency)
        self.stopping = False
        self.in_flight: set[asyncio.Task] = set()  # tasks whose request is on the wire
        # identity: pictures do not shrink, and a compressed answer can be a bomb (one that comes all the
        # same: `inflate`).
        self._headers = {
            "User-Agent": user_agent,
            "Accept": "image/*,*/*;q=0.5",
            "Accept-Encoding": "identity",
        }

    async def __aenter__(self) -> "Client":
        # A further try gets a connection of its own: one that was used before may be what failed, full of
        # what a server sent after its answer.
        self._first = self._open_session(force_close=not self.limits.keep_alive)
        self._further = self._open_session(force_close=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._first.close()
        await self._further.close()

    def _open_session(self, force_close: bool) -> aiohttp.ClientSession:
        silence_s = self.limits.read_timeout_s
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, force_close=force_close, socket_factory=self.gate.make_socket
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=silence_s, sock_read=silence_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            auto_decompress=False,
        )

    async def fetch(self, url: str) -> bytes:
        """Raises Failed, or Stopped."""
        for attempt in range(self.limits.retries + 1):
            try:
                return await self._follow(url, self._further if attempt else self._first)
            except Failed as failure:
                if self.stopping:
                    raise Stopped from failure
                if (
                    not failure.again
                    or attempt == self.limits.retries
                    or failure.after_s > self.limits.max_retry_after_s
                ):
                    raise
                backoff_s = min(self.limits.backoff_s * 2**attempt, MAX_BACKOFF_S) * random.uniform(0.5, 1.5)
                await asyncio.sleep(max(backoff_s, failure.after_s))
        raise AssertionError("the last attempt returns or raises")

    async def _follow(self, text: str, session: aiohttp.ClientSession) -> bytes:
        url = parse_url(text)
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._hop(url, session)
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise Failed("too_many_redirects", f"more than {MAX_REDIRECTS}, last to {url}")

    async def _hop(self, url: URL, session: aiohttp.ClientSession) -> bytes | URL:
        """One request: the body, or where it is said to be. Waiting for a turn counts for no time limit."""
        host = url.host or ""
        async with self.hosts.turn(host), self.places, self._on_the_wire():
            try:
                async with asyncio.timeout(self.limits.timeout_s):
                    return await self._request(url, session)
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise classified(error) from error
            except Failed as failure:
                if failure.again and 0 < failure.after_s <= self.limits.max_retry_after_s:
                    self.hosts.pause(host, failure.after_s)
                raise

    @contextlib.asynccontextmanager
    async def _on_the_wire(self):
        if self.stopping:
            raise Stopped
        task = asyncio.current_task()
        assert task is not None
        self.in_flight.add(task)
        try:
            yield
        finally:
            self.in_flight.discard(task)

    async def _request(self, url: URL, session: aiohttp.ClientSession) -> bytes | URL:
        async with session.get(url, allow_redirects=False) as response:
            if response.status in REDIRECTS and "Location" in response.headers:
                return parse_url(str(response.headers["Location"]), base=url)
            if response.status != 200:
                raise Failed(
                    f"http_{response.status}",
                    again=response.status in RETRIED,
                    after_s=retry_after_s(response.headers),
                )
            data = await self._read(response)
            ends_by_itself = (
                response.content_length is not None
                or "chunked" in response.headers.get("Transfer-Encoding", "").lower()
            )
        if not ends_by_itself and not await asyncio.to_thread(self.looks_whole, data):
            raise Failed("incomplete", f"the connection closed after {len(data)} bytes", again=True)
        return data

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        limit = self.limits.max_bytes
        if (response.content_length or 0) > limit:
            raise Failed("image_too_large", f"{response.content_length} bytes announced")
        data = bytearray()
        async for chunk in response.content.iter_any():
            data += chunk
            if len(data) > limit:
                raise Failed("image_too_large", f"more than {limit} bytes")
        if response.headers.get("Content-Encoding", "identity").lower() in ("gzip", "x-gzip", "deflate"):
            return inflate(bytes(data), limit)
        return bytes(data)


def parse_url(text: str, base: URL | None = None) -> URL:
    """An absolute http(s) address; `base`: of what redirected there. Raises Failed("bad_url")."""
    try:
        url = URL(text.strip())
        url = base.join(url) if base else url
    except ValueError as error:
        raise Failed("bad_url", str(error)) from error
    if url.scheme not in ("http", "https") or not url.host:
        raise Failed(
            "bad_url", f"only http and https are fetched, not {str(url)[:200]!r} (a file? --image_folder)"
        )
    return url


def inflate(data: bytes, limit: int) -> bytes:
    """Undoes gzip or deflate, but never to more than `limit` bytes. Raises Failed."""
    inflater = zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)
    try:
        out = inflater.decompress(data, limit)
    except zlib.error as error:
        raise Failed("incomplete", f"compressed answer: {error}", again=True) from error
    if inflater.unconsumed_tail:
        raise Failed("image_too_large", f"more than {limit} bytes when decompressed")
    if not inflater.eof:
        raise Failed("incomplete", "compressed answer cut short", again=True)
    return out


def retry_after_s(headers) -> float:
    """Seconds or a date (RFC 9110, 10.2.3); 0 where there is none that can be read."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def classified(error: Exception) -> Failed:
    """What a transfer died of, in our words."""
    cause = getattr(error, "os_error", error)
    detail = str(error)[:300]
    if isinstance(error, TimeoutError):
        return Failed("timeout", detail or "the whole answer took too long", again=True)
    if getattr(cause, "errno", None) == REFUSED:
        return Failed("private_address", detail)
    if isinstance(error, aiohttp.ClientSSLError):
        return Failed("tls", detail)
    if isinstance(cause, socket.gaierror):
        return Failed("dns", detail, again=cause.errno == socket.EAI_AGAIN)
    if isinstance(error, aiohttp.InvalidURL) or not isinstance(error, (aiohttp.ClientError, OSError)):
        return Failed("bad_url", detail)
    if isinstance(error, aiohttp.ClientPayloadError):
        return Failed("incomplete", detail, again=True)
    if getattr(cause, "errno", None) in (errno.EMFILE, errno.ENFILE):
        raise error  # the fault is ours: too many open files
    reason = "bad_response" if isinstance(error, aiohttp.ClientResponseError) else "connection"
    return Failed(reason, detail or type(error).__name__, again=True)
