"""Politeness: how many connections a host gets at once, how far apart, and when it asked to be left alone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass
class Host:
    places: asyncio.Semaphore
    free_at: float = 0.0  # the loop's clock: no request starts before
    visitors: int = 0  # inside or waiting


class Hosts:
    """One for each process, so its limits hold for the process."""

    def __init__(self, max_connections: int, delay_s: float) -> None:
        self.max_connections = max_connections
        self.delay_s = delay_s
        self._hosts: dict[str, Host] = {}

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """Waits for a place at the host and for its delay; the request is made inside."""
        host = self._hosts.get(name) or self._hosts.setdefault(name, Host(asyncio.Semaphore(self.max_connections)))
        host.visitors += 1
        try:
            async with host.places:
                await self._wait(host)
                yield
        finally:
            host.visitors -= 1
            self._forget(name, host)

    def pause(self, name: str, seconds: float) -> None:
        """Nobody asks this host for so long: it answered with Retry-After. For use inside its turn."""
        host = self._hosts[name]
        host.free_at = max(host.free_at, now() + seconds)

    async def _wait(self, host: Host) -> None:
        # Again after each sleep: another visitor may have gone first, or the host may have asked for a pause.
        while (seconds := host.free_at - now()) > 0:
            await asyncio.sleep(seconds)
        host.free_at = now() + self.delay_s

    def _forget(self, name: str, host: Host) -> None:
        """A billion URLs have millions of hosts: only those in use, or resting, are kept."""
        if host.visitors == 0 and host.free_at <= now():
            del self._hosts[name]


def now() -> float:
    return asyncio.get_running_loop().time()
