"""A page to talk to a model, and chat completions for programs, by the standard library's HTTP server.

    GET  /                      the page (chat.html): pictures, turns, answers as they come
    POST /v1/chat/completions   see openai.py; with "stream": true as server-sent events
    POST /grid                  an image -> its patches, for the page
    GET  /v1/models             the one model, and whether it knows conversations or one turn alone
    GET  /health

Bounded: the size of a body, how many are served at a time, how long a client may be silent.
"""

import contextlib
import json
import select
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from experiments.vlm.data.image import probe
from experiments.vlm.data.rejects import Rejected, meaning
from experiments.vlm.generate import openai
from experiments.vlm.generate.service import EngineFailed, Service
from torchtitan import __version__
from torchtitan.config.errors import UserError
from torchtitan.generation.engine import Request
from torchtitan.tools.logging import logger

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SILENT_S = 60.0  # a client that sends or takes nothing for so long is left
DISCARD_S = 2.0  # what a refused client still sends is read for so long
AT_A_TIME = 64  # connections; further ones are answered with 503
DECODED_AT_A_TIME = 2  # requests whose images are decoded, each of which may take 3 GB meanwhile
MODEL_FAILED = openai.failure("the model failed", "server_error")


@dataclass(frozen=True)
class RequestLimits:
    """What one request may cost."""

    body_bytes: int
    max_tokens: int


class Server(ThreadingHTTPServer):
    """Serves one Service; `serve_forever` and `shutdown` are the base's."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], service: Service, name: str, limits: RequestLimits):
        """`name`: what the model is called. Raises OSError where the port is taken."""
        self.address_family = family_of(address[0])
        super().__init__(address, Handler)
        self.service = service
        self.name = name
        self.limits = limits
        self.loopback = address[0] in LOOPBACK
        self.room = threading.BoundedSemaphore(AT_A_TIME)
        self.decoding = threading.BoundedSemaphore(DECODED_AT_A_TIME)
        self.page = resources.files(__package__).joinpath("chat.html").read_bytes()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One connection that fails is none of the others' business."""
        logger.warning(f"a connection from {client_address[0]} failed", exc_info=True)


def family_of(host: str) -> socket.AddressFamily:
    """By its spelling."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    server_version = f"torchtitan-vlm/{__version__}"
    sys_version = ""
    timeout = SILENT_S

    def do_GET(self) -> None:
        """The page, and what is there."""
        if self.path == "/":
            self._send(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        elif self.path == "/v1/models":
            model: dict[str, Any] = {"id": self.server.name, "object": "model", "owned_by": "torchtitan-vlm"}
            model["conversations"] = self.server.service.prompter.template is not None
            self._json(HTTPStatus.OK, {"object": "list", "data": [model]})
        elif self.path == "/health":
            self._json(HTTPStatus.OK, {"status": "ok"})
        else:
            self._json(HTTPStatus.NOT_FOUND, openai.failure("there is nothing at this path", "not_found"))

    def do_POST(self) -> None:
        """Answers, or the reason why there is none."""
        if not self._is_ours():
            return
        work = {"/v1/chat/completions": self._complete, "/grid": self._grid}.get(self.path)
        if work is None:
            self.close_connection = True
            self._json(HTTPStatus.NOT_FOUND, openai.failure("there is nothing at this path", "not_found"))
            return
        if not self.server.room.acquire(blocking=False):
            self.close_connection = True
            busy = openai.failure(f"{AT_A_TIME} requests are being answered: come again", "overloaded")
            self._json(HTTPStatus.SERVICE_UNAVAILABLE, busy)
            return
        try:
            self._answer(work)
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # who asked is gone
        finally:
            self.server.room.release()

    def _answer(self, work: Callable[[bytes], None]) -> None:
        try:
            body = self._body()
            if body is not None:
                work(body)
        except UserError as error:
            self._json(HTTPStatus.BAD_REQUEST, openai.failure(str(error)))
        except EngineFailed:
            self._json(HTTPStatus.INTERNAL_SERVER_ERROR, MODEL_FAILED)
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            logger.exception("a request failed")
            failure = openai.failure("the server failed: its log says how", "server_error")
            self._json(HTTPStatus.INTERNAL_SERVER_ERROR, failure)

    def _is_ours(self) -> bool:
        """A page of another site can send its visitors' browsers here, but neither by the name of this
        machine (its own name would lead here) nor as JSON.
        """
        host = self.headers.get("Host", "").rpartition(":")[0].strip("[]") or self.headers.get("Host", "")
        kind = self.headers.get("Content-Type", "")
        if self.server.loopback and host not in LOOPBACK:
            refused = f"this server answers at {', '.join(LOOPBACK)} alone"
        elif self.path.startswith("/v1") and not kind.lower().startswith("application/json"):
            refused = "Content-Type: must be application/json"
        else:
            return True
        self.close_connection = True
        self._json(HTTPStatus.FORBIDDEN, openai.failure(refused))
        return False

    def _body(self) -> bytes | None:
        """None where it was refused."""
        length = self.headers.get("Content-Length", "")
        most = self.server.limits.body_bytes
        if length.isdecimal() and len(length) < 16 and int(length) <= most:
            return self._read(int(length))
        self.close_connection = True
        if length.isdecimal():
            failure = openai.failure(f"a request may have {most / 2**20:g} MB")
            self._json(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, failure)
            self._discard()
        else:
            self._json(HTTPStatus.LENGTH_REQUIRED, openai.failure("Content-Length: is not there"))
        return None

    def _read(self, length: int) -> bytes:
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            raise UserError(f"nothing more of the body came for {SILENT_S:g} s") from None
        if len(body) < length:
            raise UserError(f"the body ended after {len(body)} of the {length} bytes of Content-Length")
        return body

    def _discard(self) -> None:
        """Read on for a while: a client that is still sending would else never see the answer."""
        end = time.monotonic() + DISCARD_S
        self.connection.settimeout(DISCARD_S)
        with contextlib.suppress(OSError):
            while time.monotonic() < end and self.connection.recv(1 << 16):
                pass

    def _complete(self, body: bytes) -> None:
        asked = openai.parse(body, self.server.limits.max_tokens)
        with self.server.decoding if asked.pictures else contextlib.nullcontext():
            prompt = self.server.service.prompter.prompt(asked.turns)
        request = Request(0, prompt, asked.sampling, asked.seed, asked.max_tokens, asked.stops)
        id, events = f"chatcmpl-{uuid.uuid4().hex}", self.server.service.ask(request)
        with contextlib.closing(events):
            if asked.stream:
                self._stream(openai.chunks(id, self.server.name, events, len(prompt.ids), asked))
                return
            for event in events:
                answer = event.answer
                if self._is_gone():
                    raise ConnectionError
        whole = openai.completion(id, self.server.name, answer, len(prompt.ids), asked.logprobs)
        self._json(HTTPStatus.OK, whole)

    def _is_gone(self) -> bool:
        """Whether who asked has closed the connection."""
        asked = select.poll()
        asked.register(self.connection, select.POLLIN)
        return bool(asked.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)

    def _stream(self, pieces: Iterator[dict[str, Any]]) -> None:
        self.close_connection = True
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for piece in pieces:
                self._event(json.dumps(piece))
            self._event("[DONE]")
        except EngineFailed:
            self._event(json.dumps(MODEL_FAILED))

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())

    def _grid(self, body: bytes) -> None:
        try:
            height, width = probe(body)
        except Rejected as rejected:
            raise UserError(meaning(rejected.reason)) from None
        plan = self.server.service.prompter.plan
        layout = plan.layout(height, width)
        shown, tokens = layout.views[0], layout.visual_tokens
        self._json(HTTPStatus.OK, {"h": shown.h, "w": shown.w, "tokens": tokens, "merge": plan.merge_size})

    def _json(self, status: HTTPStatus, value: dict[str, Any]) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: HTTPStatus, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses, in the form of all errors."""
        self.close_connection, self.request_version = True, self.protocol_version
        self._json(HTTPStatus(code), openai.failure(message or HTTPStatus(code).phrase))

    def log_message(self, format: str, *args: Any) -> None:
        """What is asked is nobody's business."""
