"""An HTTP server on loopback that does everything wrong that servers do. A process of its own:
`HostileServer` starts it.

The first part of a path says how it behaves, the rest which image it serves: /good/7 is image 7 as it should
be. It speaks raw bytes, since no library would send what it has to send. `deliveries` counts answers that
were written to the last byte.
"""

import asyncio
import gzip
import io
import json
import os
import subprocess
import sys
import time
import urllib.request
import zlib
from collections import Counter
from urllib.parse import unquote

import numpy as np
from PIL import Image

HOSTS = ("127.0.0.1", "127.0.0.2")  # the second stands for a private address: nothing may ever reach it


def image(number: int, form: str = "JPEG") -> bytes:
    """Different for each number, and always the same. Noise, so that it takes several packets."""
    noise = np.random.default_rng(number).integers(0, 255, (60 + number % 40, 80, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, form, **({"quality": 90} if form == "JPEG" else {}))
    return out.getvalue()


def bomb_png() -> bytes:
    """An image of 60000 x 60000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = (60000).to_bytes(4, "big")
    parts = (
        chunk(b"IHDR", size + size + bytes([8, 2, 0, 0, 0])),
        chunk(b"IDAT", zlib.compress(b"")),
        chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


class Server:
    def __init__(self) -> None:
        self.requests: Counter = Counter()
        self.deliveries: Counter = Counter()
        self.starts: list[tuple[float, str]] = []
        self.at_once = self.most_at_once = 0
        self.reached = [0, 0]  # connections to each of HOSTS

    async def serve(self, port: int) -> None:
        first = await asyncio.start_server(lambda r, w: self.connect(r, w, 0), HOSTS[0], port)
        port = first.sockets[0].getsockname()[1]
        await asyncio.start_server(lambda r, w: self.connect(r, w, 1), HOSTS[1], port)
        self.port = port
        print(port, flush=True)
        await asyncio.to_thread(sys.stdin.read)  # until the parent closes it, or ends
        os._exit(0)

    async def connect(self, reader, writer, address: int) -> None:
        try:
            while line := await reader.readline():
                path = line.split()[1].decode()
                while (await reader.readline()).strip():
                    pass
                if path == "/stats":
                    await send(writer, json.dumps(self.stats()).encode())
                    break
                self.reached[address] += 1
                self.requests[path] += 1
                self.starts.append((time.monotonic(), path))
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                try:
                    keep = await self.answer(writer, path)
                finally:
                    self.at_once -= 1
                if not keep:
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def stats(self) -> dict:
        return {
            "requests": self.requests,
            "deliveries": self.deliveries,
            "starts": self.starts,
            "most_at_once": self.most_at_once,
            "reached": self.reached,
        }

    async def answer(self, writer, path: str) -> bool | None:
        behaviour, _, rest = path.strip("/").partition("/")
        result = await getattr(self, behaviour)(writer, rest, self.requests[path])
        if result is not False:
            self.deliveries[path] += 1
        return result

    # Each behaviour returns True where the connection stays open, False where it did not deliver what was
    # asked for.

    async def good(self, writer, rest, time_asked):
        await send(writer, image(int(rest)), "Connection: keep-alive")
        return True

    async def same(self, writer, rest, time_asked):
        """The same image whatever the path."""
        await send(writer, image(1000))

    async def slow(self, writer, rest, time_asked):
        await asyncio.sleep(0.02 * (int(rest) % 5))
        data = image(int(rest))
        writer.write(head(len(data)))
        for start in range(0, len(data), 4096):
            writer.write(data[start : start + 4096])
            await writer.drain()
            await asyncio.sleep(0.005)

    async def stall(self, writer, rest, time_asked):
        await asyncio.sleep(3600)
        return False

    async def trickle(self, writer, rest, time_asked):
        """A byte now and then, for ever: within every limit but the one for the whole."""
        writer.write(head(100_000))
        for _ in range(36_000):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.1)
        return False

    async def drop_once(self, writer, rest, time_asked):
        data = image(int(rest))
        writer.write(head(len(data)) + (data if time_asked > 1 else data[: len(data) // 2]))
        await writer.drain()
        return None if time_asked > 1 else False

    async def drop_unseen(self, writer, rest, time_asked):
        """No length, so the dropped connection looks like the end of the answer."""
        data = image(int(rest))
        writer.write(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
            + (data if time_asked > 1 else data[: len(data) // 2])
        )
        await writer.drain()
        return None if time_asked > 1 else False

    async def drop_at_once(self, writer, rest, time_asked):
        writer.transport.abort()
        return False

    async def announces_more(self, writer, rest, time_asked):
        data = image(int(rest))
        writer.write(head(len(data) + 1000) + data)
        await writer.drain()
        return False

    async def announces_less(self, writer, rest, time_asked):
        data = image(int(rest))
        writer.write(head(len(data) - 1000) + data)
        await writer.drain()

    async def goes_on(self, writer, rest, time_asked):
        """The image as it should be, and something more when nobody asked: the next user of the connection
        gets it.
        """
        await send(writer, image(int(rest)), "Connection: keep-alive")
        await asyncio.sleep(0.05)
        writer.write(b"\0more\0")
        await writer.drain()
        return True

    async def announces_huge(self, writer, rest, time_asked):
        writer.write(head(10**12) + image(0))
        await writer.drain()
        return False

    async def endless(self, writer, rest, time_asked):
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(2000):
            writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            await writer.drain()
        return False

    async def garbage(self, writer, rest, time_asked):
        writer.write(b"\x00\x01 this is no HTTP\r\n\r\n")
        await writer.drain()
        return False

    async def called_html(self, writer, rest, time_asked):
        await send(writer, image(int(rest)), "Content-Type: text/html")

    async def png_called_jpeg(self, writer, rest, time_asked):
        await send(writer, image(int(rest), "PNG"), "Content-Type: image/jpeg")

    async def html_called_jpeg(self, writer, rest, time_asked):
        await send(writer, b"<html>not here</html>", "Content-Type: image/jpeg")

    async def empty(self, writer, rest, time_asked):
        await send(writer, b"")

    async def bomb(self, writer, rest, time_asked):
        await send(writer, bomb_png())

    async def gzipped(self, writer, rest, time_asked):
        await send(writer, gzip.compress(image(int(rest))), "Content-Encoding: gzip")

    async def gzip_bomb(self, writer, rest, time_asked):
        await send(writer, gzip.compress(bytes(50 << 20)), "Content-Encoding: gzip")

    async def status(self, writer, rest, time_asked):
        await send(writer, b"no", status=int(rest.partition("?")[0]))
        return False

    async def flaky(self, writer, rest, time_asked):
        """/flaky/503/7: that status once, then image 7."""
        status, number = map(int, rest.split("/"))
        if time_asked == 1:
            await send(writer, b"later", "Retry-After: 1" if status == 429 else "X: y", status=status)
            return False
        await send(writer, image(number))

    async def asks_long_rest(self, writer, rest, time_asked):
        await send(writer, b"later", "Retry-After: 3600", status=429)
        return False

    async def redirect(self, writer, rest, time_asked):
        await send(writer, b"", f"Location: /{rest}", status=302)
        return False

    async def loop(self, writer, rest, time_asked):
        await send(writer, b"", "Location: /loop/", status=301)
        return False

    async def to(self, writer, rest, time_asked):
        """Redirects to an address: /to/http/127.0.0.2; PORT stands for this server's."""
        scheme, _, where = rest.partition("/")
        await send(
            writer,
            b"",
            f"Location: {scheme}://{unquote(where).replace('PORT', str(self.port))}/good/1",
            status=302,
        )
        return False


def head(length: int, *headers: str, status: int = 200) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} So", f"Content-Length: {length}", *headers, "", ""]).encode()


async def send(writer, data: bytes, *headers: str, status: int = 200) -> None:
    writer.write(head(len(data), *headers, status=status) + data)
    await writer.drain()


class HostileServer:
    """`with HostileServer() as server: server.url("good/7")`."""

    def __enter__(self) -> "HostileServer":
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.port = int(self.process.stdout.readline())
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def url(self, path: str, host: str = HOSTS[0]) -> str:
        return f"http://{host}:{self.port}/{path}"

    def stats(self) -> dict:
        with urllib.request.urlopen(self.url("stats")) as answer:
            return json.load(answer)


if __name__ == "__main__":
    asyncio.run(Server().serve(0))
