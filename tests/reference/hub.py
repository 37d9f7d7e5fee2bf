"""A stand-in for the Hugging Face hub on the loopback address, as far as its library asks."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """`repositories`: OWNER/NAME -> file -> content. Of gated ones the list is given, the files only with a
    token. `cut`: files of which the first answer ends in the middle.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories = repositories
        self.gated: set[str] = set()
        self.cut: set[str] = set()
        self.given: list[str] = []  # files whose content was asked for, in order

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        if path[:2] == ["api", "models"]:
            self._list("/".join(path[2:4]), tree="tree" in path[4:5])
        else:
            self._give("/".join(path[:2]), "/".join(path[4:]))

    do_HEAD = do_GET

    def _list(self, repository: str, tree: bool) -> None:
        files = self.server.repositories.get(repository)
        if files is None:
            return self._fail(404, "RepoNotFound")
        sizes = {name: len(content) for name, content in files.items()}
        siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
        entries = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
        about = {"id": repository, "sha": COMMIT, "siblings": siblings}
        self._send(json.dumps(entries if tree else about).encode(), {})

    def _give(self, repository: str, name: str) -> None:
        content = self.server.repositories.get(repository, {}).get(name)
        if content is None:
            return self._fail(404, "EntryNotFound")
        if repository in self.server.gated and "authorization" not in self.headers:
            return self._fail(403, "GatedRepo")
        etag = hashlib.sha256(content).hexdigest()
        self._send(content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, name)

    def _send(self, content: bytes, headers: dict[str, str], name: str = "") -> None:
        start = int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        content = content[start:]
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.server.given += [name] if name else []
            if name in self.server.cut:
                self.server.cut.remove(name)
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            else:
                self.wfile.write(content)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    hub = Hub(repositories)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
