"""Which addresses may be connected to, and how politely a host is asked.

The check of an address sits where the socket is made, so what is checked is what is connected to: a name that
resolves differently the second time, a redirect, or an address written in an odd way reaches it like any
other.
"""

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

NAT64 = IPv6Network("64:ff9b::/96")
# Not an errno of any system: marks a refusal of ours, through libraries that keep only the number.
REFUSED = -7001


def carried_ipv4(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 address leads to, where it carries one (mapped, 6to4, NAT64)."""
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def is_public(address: Address) -> bool:
    """Not private, loopback, link-local, multicast or reserved, as `ipaddress` knows IANA's registries."""
    if isinstance(address, IPv6Address) and (carried := carried_ipv4(address)):
        address = carried
    return address.is_global and not address.is_multicast and not address.is_reserved


@dataclass(frozen=True)
class Gate:
    """Makes sockets for permitted addresses only."""

    allow_private: bool = False
    networks: tuple[Network, ...] = field(default=())  # permitted although private

    def permits(self, text: str) -> bool:
        """Whether an IP address in text may be connected to."""
        address = ipaddress.ip_address(text.partition("%")[0])  # without the scope of fe80::1%eth0
        return (
            self.allow_private or is_public(address) or any(address in network for network in self.networks)
        )

    def make_socket(self, address_info: tuple[Any, ...]) -> socket.socket:
        """For aiohttp's `socket_factory`: `address_info` is a row of getaddrinfo. Raises OSError(REFUSED)."""
        family, kind, protocol, _, target = address_info
        if not self.permits(target[0]):
            raise OSError(REFUSED, f"{target[0]} is not a public address")
        return socket.socket(family, kind, protocol)


@dataclass
class Host:
    """One host's places, and when it may be asked next."""

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
        host = self._hosts.get(name) or self._hosts.setdefault(
            name, Host(asyncio.Semaphore(self.max_connections))
        )
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
    """The event loop's clock, seconds."""
    return asyncio.get_running_loop().time()
