"""Images by their address, for records that hold URLs.

http(s) only, a few seconds each, five redirects at most. A name is resolved once, what it resolves to is checked, and
that very address is connected to, for redirects too.

The first outcome is the outcome. Bytes are kept in the file cache, and that an address did not answer in its folder `failed`,
so a sample that is read again, by another rank or a run that goes on, is the same one. This holds as long as they share that
folder, file locks in it work, and nothing had to be thrown out of it. To ask again what failed, delete `failed`, or change
data.url_timeout_s.

For more than a trial, fetch beforehand: scripts/prepare_data.py.
"""

import contextlib
import functools
import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import SplitResult, urljoin, urlsplit

from experiments.vlm.config import Data
from experiments.vlm.data.addresses import REFUSED, Gate
from experiments.vlm.data.file_cache import FileCache, file_cache
from experiments.vlm.data.rejects import Rejected

MAX_BYTES = 64 << 20
MAX_REDIRECTS = 5
THREADS = 16
FAILED_BYTES = 64 << 20  # of notes about addresses that failed; those that were met longest ago go first
HEADERS = {"User-Agent": "torchtitan-vlm/0.1 (training data)", "Accept": "image/*, */*;q=0.5", "Accept-Encoding": "identity"}


class Fetcher:
    """Thread-safe; one a process and configuration."""

    def __init__(self, cache: FileCache, timeout_s: float, allow_private: bool):
        self.cache = cache
        self.timeout_s = timeout_s
        self.gate = Gate(allow_private)
        self.failures = FileCache(cache.folder / "failed", FAILED_BYTES)
        self._failed: dict[str, tuple[str, str]] = {}  # reason and detail; the exceptions would keep their frames
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def fetch(self, url: str) -> bytes:
        """The bytes behind an address, from the cache if they are there. Raises Rejected."""
        if url in self._failed:
            raise Rejected(*self._failed[url])
        try:
            return self.cache.get(url, lambda path: self._write(url, path), ".image").read_bytes()
        except Rejected as rejected:
            self._failed[url] = rejected.reason, rejected.detail
            raise
        except FileNotFoundError:  # thrown out of the cache in between
            return self._download(url)

    def fetch_ahead(self, urls: Iterable[str]) -> None:
        """Fetch several at one time, so that a document waits for its slowest image and not for the sum of them."""
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
        """Called while no other process asks for this address: whoever waited finds the outcome."""
        origin = f"{self.timeout_s} {url}"
        if note := self.failures.find(origin):
            raise Rejected("image_fetch", f"{note.read_text(errors='replace')} (remembered in {self.failures.folder})")
        try:
            path.write_bytes(self._download(url))
        except Rejected as rejected:
            # What is refused without asking, for what it is or where it leads, is refused again all the same.
            if rejected.reason == "image_fetch":
                self._remember(origin, rejected.detail)
            raise

    def _remember(self, origin: str, detail: str) -> None:
        def write(note: Path) -> None:
            note.write_text(detail, errors="replace")

        self.failures.get(origin, write)

    def _download(self, url: str) -> bytes:
        attempt = _Attempt(self.gate, time.monotonic() + self.timeout_s)
        try:
            return attempt.run(url)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, OSError) and error.errno == REFUSED:
                raise Rejected("image_address", f"{url}: {error.strerror}") from error
            raise Rejected("image_fetch", f"{url}: {error or type(error).__name__}") from error


class _Attempt:
    """One download. The deadline holds for the sum of everything, by closing the connection from outside."""

    def __init__(self, gate: Gate, deadline: float):
        self.gate = gate
        self.deadline = deadline

    def run(self, url: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            body, redirect = self._get(url)
            if not redirect:
                return body
            url = urljoin(url, redirect)
        raise Rejected("image_fetch", f"{url}: more than {MAX_REDIRECTS} redirects")

    def left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("too slow")
        return left

    def _get(self, url: str) -> tuple[bytes, str]:
        """The body, or the address it has moved to."""
        target = urlsplit(url)
        if target.scheme not in ("http", "https") or not target.hostname:
            raise Rejected("image_address", f"{url[:200]}: not an http(s) address")
        connection = http.client.HTTPConnection(target.hostname, target.port, timeout=self.left())
        connection.sock = self._connect(target)
        # A server may drip a byte a second, each within the socket's own limit: this ends it.
        guard = threading.Timer(self.left(), _shut, (connection.sock,))
        guard.start()
        try:
            path = (target.path or "/") + (f"?{target.query}" if target.query else "")
            connection.request("GET", _ascii(path), headers={**HEADERS, "Host": target.netloc.rpartition("@")[2]})
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308):
                return b"", response.getheader("Location") or ""
            if response.status != 200:
                raise Rejected("image_fetch", f"{url}: HTTP {response.status}")
            return self._body(response), ""
        finally:
            guard.cancel()
            connection.close()

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        body = response.read(MAX_BYTES + 1)
        self.left()
        if len(body) > MAX_BYTES:
            raise Rejected("image_too_large", f"more than {MAX_BYTES >> 20} MiB")
        if response.length:
            raise http.client.IncompleteRead(body, response.length)
        return body

    def _connect(self, target: SplitResult) -> socket.socket:
        port = target.port or (443 if target.scheme == "https" else 80)
        error: OSError = OSError("no address")
        for row in socket.getaddrinfo(target.hostname, port, type=socket.SOCK_STREAM):
            made = self.gate.make_socket(row)
            try:
                made.settimeout(self.left())
                made.connect(row[4])
                if target.scheme == "https":
                    made = ssl.create_default_context().wrap_socket(made, server_hostname=target.hostname)
                return made
            except OSError as failed:
                made.close()
                error = failed
        raise error


def about_failures(data: Data) -> str:
    """For people, once an address did not answer: what stays the same, and what does not."""
    folder = file_cache(data).folder
    return (
        f"images by address: what did not answer stays left out for all ranks and later runs that share {folder}; batches may differ "
        f"where machines do not share it, or where data.cache_gb is too small for all images; delete {folder / 'failed'} to ask again"
    )


def make_fetcher(data: Data) -> Fetcher:
    """One a process, so that it knows what failed before; a forked worker has its own, with threads of its own."""
    return _make_fetcher(os.getpid(), file_cache(data), data.url_timeout_s, data.allow_private_urls)


@functools.cache
def _make_fetcher(process: int, cache: FileCache, timeout_s: float, allow_private: bool) -> Fetcher:
    return Fetcher(cache, timeout_s, allow_private)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # not TLS's own, which would wait for an answer


def _ascii(path: str) -> str:
    """Addresses in the wild hold spaces and letters that should have been escaped."""
    return "".join(c if "!" <= c <= "~" else "".join(f"%{byte:02X}" for byte in c.encode("utf-8", "replace")) for c in path)
