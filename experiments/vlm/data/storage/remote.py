"""Remote files by fsspec, opened here and nowhere else, so that each transfer may stall for equally long.

What its clients raise: see `remote` of outages.py.
"""

from typing import Any

import fsspec
from fsspec.core import OpenFile
from fsspec.spec import AbstractFileSystem

from experiments.vlm.data.storage.outages import NOT_THERE, remote

STALLED_S = 20.0  # without one byte of a transfer


def file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """Where a URL leads, and the path there; of a path without a scheme this machine's files."""
    return fsspec.core.url_to_fs(url, **_client_options(url))


def open_file(url: str) -> OpenFile:
    """To be entered for its bytes, which begin to come then."""
    return fsspec.open(url, "rb", **_client_options(url))


def is_http(url: str) -> bool:
    """Whether it is an address, which may have a query."""
    return url.startswith(("http://", "https://"))


def is_file(url: str) -> bool:
    """Raises OSError where the storage does not answer, which fsspec's own takes for a no."""
    try:
        with remote():
            system, path = file_system(url)
            return bool(system.info(path)["type"] == "file")
    except NOT_THERE:
        return False


def _client_options(url: str) -> dict[str, Any]:
    """fsspec's own client of HTTP gives a whole file five minutes, and one that stalls as long; and it asks
    for a file in pieces, which many servers do not send, and which are of two files where one took the
    other's place meanwhile. A block size of 0 makes that one answer.
    """
    if not is_http(url):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALLED_S, sock_read=STALLED_S)
    return {"client_kwargs": {"timeout": timeout}, "block_size": 0}
