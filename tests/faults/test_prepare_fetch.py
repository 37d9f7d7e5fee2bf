"""One URL against a hostile server: what arrives, what fails and why, and how politely."""

import asyncio
import socket
import time
from dataclasses import replace
from ipaddress import ip_network

import pytest

from experiments.vlm.data.storage.client import Client, Failed, Limits, inflate, retry_after_s
from experiments.vlm.data.storage.hosts import REFUSED, Gate, Hosts
from experiments.vlm.prepare.images import looks_whole
from tests.faults.hostile_server import HOSTS, HostileServer, image

LOOPBACK = Gate(networks=(ip_network("127.0.0.1/32"),))
# As long as a busy machine may need.
LIMITS = Limits(
    timeout_s=120, read_timeout_s=120, max_bytes=1 << 20, retries=1, backoff_s=0.02, max_retry_after_s=5.0
)


@pytest.fixture(scope="module")
def server():
    with HostileServer() as server:
        yield server


def fetch(
    *urls: str, gate: Gate = LOOPBACK, max_per_host: int = 8, limits: Limits = LIMITS
) -> list[bytes | Failed]:
    async def one(client: Client, url: str) -> bytes | Failed:
        try:
            return await client.fetch(url)
        except Failed as failed:
            return failed

    async def all_of_them() -> list[bytes | Failed]:
        async with Client(limits, gate, Hosts(max_per_host, 0.0), 64, "test", looks_whole) as client:
            return await asyncio.gather(*(one(client, url) for url in urls))

    return asyncio.run(all_of_them())


def reason(result: bytes | Failed) -> str:
    return result.reason if isinstance(result, Failed) else f"{len(result)} bytes"


GOOD = [
    *("good/1", "slow/2", "drop_once/3", "drop_unseen/4", "flaky/500/5", "flaky/503/6"),
    *("redirect/redirect/good/7", "called_html/8", "gzipped/9"),
]
BAD = {
    "status/404": "http_404",
    "status/403": "http_403",
    "status/500": "http_500",
    "status/429": "http_429",
    "status/410": "http_410",
    "asks_long_rest/": "http_429",
    "announces_more/1": "incomplete",
    "announces_huge/": "image_too_large",
    "endless/": "image_too_large",
    "gzip_bomb/": "image_too_large",
    "drop_at_once/": "connection",
    "garbage/": "bad_response",
    "loop/": "too_many_redirects",
    "to/file/etc/passwd": "bad_url",
    "to/http/127.0.0.2:PORT": "private_address",
    "to/http/[::ffff:127.0.0.2]:PORT": "private_address",
    "to/http/169.254.169.254": "private_address",
    "to/http/10.0.0.1": "private_address",
    "to/http/[::1]:PORT": "private_address",
    "to/http/[fe80::1]": "private_address",
    "to/http/0.0.0.0:PORT": "private_address",
}


def test_every_answer_arrives_or_fails_for_its_reason(server):
    results = fetch(*map(server.url, [*GOOD, *BAD]))
    assert [reason(result) for result in results[len(GOOD) :]] == list(BAD.values())
    assert results[: len(GOOD)] == [image(number) for number in range(1, len(GOOD) + 1)]
    assert server.stats()["reached"][1] == 0, "a private address was connected to"


@pytest.mark.parametrize("path", ["stall/", "trickle/"])
def test_what_says_nothing_or_never_ends_is_given_up(server, path):
    """The server would go on for an hour."""
    limits = replace(LIMITS, timeout_s=0.6, read_timeout_s=0.3)
    assert reason(fetch(server.url(path), limits=limits)[0]) == "timeout"


@pytest.mark.parametrize(
    "url",
    ["ftp://host/x", "file:///etc/passwd", "http://", "nonsense", "http://[::1", "javascript:alert(1)", ""],
)
def test_only_http_urls_are_fetched(url):
    assert reason(fetch(url)[0]) == "bad_url"


def test_private_addresses_are_refused_by_name_and_by_number(server):
    names = ["localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "[::1]", "[::ffff:7f00:1]"]
    reasons = [
        reason(result) for result in fetch(*(server.url("good/1", name) for name in names), gate=Gate())
    ]
    # Numbers written in an odd way are refused as addresses or, by newer clients, as no URL at all.
    assert set(reasons) <= {"private_address", "bad_url"} and reasons[:2] == ["private_address"] * 2
    assert isinstance(fetch(server.url("good/1"), gate=Gate(allow_private=True))[0], bytes)


def test_a_name_that_changes_its_address_is_checked_where_it_is_connected_to(server, monkeypatch):
    """DNS rebinding: the first answer is harmless, the next one is not."""
    real, answers = socket.getaddrinfo, iter([HOSTS[0]] + [HOSTS[1]] * 20)
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *a, **k: real(next(answers) if host == "rebind.test" else host, *a, **k),
    )
    before = server.stats()["reached"][1]
    assert isinstance(fetch(server.url("good/1", "rebind.test"))[0], bytes)
    assert reason(fetch(server.url("good/1", "rebind.test"))[0]) == "private_address"
    assert server.stats()["reached"][1] == before


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("64:ff9b::5db8:d822", True),  # NAT64 of a public address
        *(
            (address, False)
            for address in (
                "10.1.2.3",
                "172.16.0.1",
                "192.168.1.1",
                "127.0.0.1",
                "169.254.169.254",
                "0.0.0.0",
            )
        ),
        *(
            (address, False)
            for address in (
                "100.64.0.1",
                "224.0.0.1",
                "255.255.255.255",
                "240.0.0.1",
                "192.0.2.1",
                "198.18.0.1",
            )
        ),
        *(
            (address, False)
            for address in (
                "::",
                "::1",
                "fe80::1%eth0",
                "fc00::1",
                "ff02::1",
                "::ffff:10.0.0.1",
                "::127.0.0.1",
            )
        ),
        *((address, False) for address in ("64:ff9b::a00:1", "2002:a00:1::1", "2001:db8::1", "64:ff9b:1::1")),
    ],
)
def test_which_addresses_are_public(address, public):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    row = (family, socket.SOCK_STREAM, 0, "", (address, 80))
    if public:
        Gate().make_socket(row).close()
    else:
        with pytest.raises(OSError) as refused:
            Gate().make_socket(row)
        assert refused.value.errno == REFUSED


def test_a_host_gets_no_more_connections_than_allowed():
    with HostileServer() as server:
        fetch(*(server.url(f"slow/{number}") for number in range(12)), max_per_host=3)
        assert 1 < server.stats()["most_at_once"] <= 3


def test_requests_to_a_host_are_apart_and_other_hosts_do_not_wait():
    async def visit() -> tuple[list[float], list[float]]:
        hosts, starts = Hosts(4, 0.02), []

        async def turn(name: str, starts: list[float]) -> None:
            async with hosts.turn(name):
                starts.append(asyncio.get_running_loop().time())

        await asyncio.gather(*(turn("a", starts) for _ in range(10)), turn("b", others := []))
        return starts, others

    starts, [other] = asyncio.run(visit())
    assert min(later - sooner for sooner, later in zip(starts, starts[1:], strict=False)) >= 0.02
    assert other <= starts[1]


def test_retry_after_leaves_the_whole_host_alone():
    with HostileServer() as server:
        results = fetch(
            server.url("flaky/429/1"), *(server.url(f"slow/{number}") for number in range(6)), max_per_host=1
        )
        starts = server.stats()["starts"]
    assert all(isinstance(result, bytes) for result in results)
    asked = next(start for start, path in starts if path.startswith("/flaky"))
    assert min(start for start, _ in starts if start > asked) - asked > 0.95


def test_what_a_server_sends_after_its_answer_harms_no_other_image(server):
    async def one_after_the_other() -> list[bytes]:
        async with Client(LIMITS, LOOPBACK, Hosts(8, 0.0), 64, "test", looks_whole) as client:
            for paths in (
                [f"goes_on/{number}" for number in range(8)],
                [f"good/{number}" for number in range(8)],
            ):
                got = await asyncio.gather(*(client.fetch(server.url(path)) for path in paths))
                await asyncio.sleep(0.1)
            return got

    assert asyncio.run(one_after_the_other()) == [image(number) for number in range(8)]


def test_retry_after_as_a_date():
    when = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 7200))
    assert 6000 < retry_after_s({"Retry-After": when}) <= 7201
    assert retry_after_s({"Retry-After": "7"}) == 7
    assert retry_after_s({"Retry-After": "soon"}) == retry_after_s({}) == 0


def test_hosts_that_rest_are_forgotten():
    async def visit() -> int:
        hosts = Hosts(2, 0.0)
        for number in range(100):
            async with hosts.turn(str(number)):
                pass
        return len(hosts._hosts)

    assert asyncio.run(visit()) == 0


def test_inflate_stops_at_the_limit():
    import zlib

    data = bytes(5000)
    assert inflate(zlib.compress(data), 5000) == data
    for limit, cut, expected in ((4999, None, "image_too_large"), (5000, -3, "incomplete")):
        with pytest.raises(Failed) as failed:
            inflate(zlib.compress(data)[:cut], limit)
        assert failed.value.reason == expected
