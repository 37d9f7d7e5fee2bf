"""Shards over HTTP: whether the server says that one is not there, or does not answer as it should."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from experiments.vlm.config import Data, Source
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.sources import shards
from experiments.vlm.data.sources.shards import open_shard
from experiments.vlm.data.storage.patience import Away


class Answers(BaseHTTPRequestHandler):
    """The same status to every request; 0: half of a body, then silence."""

    def do_GET(self):  # noqa: N802
        if self.server.status:
            return self.send_error(self.server.status)
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"x" * 500)
            self.server.over.wait()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    serving = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    serving.over, serving.daemon_threads = threading.Event(), True
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield serving
    serving.over.set()
    serving.shutdown()
    serving.server_close()


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, Rejected), (410, Rejected), (503, Away), (429, Away), (401, Away), (500, Away), (0, Away)],
)
def test_over_http_a_shard_is_away_unless_the_server_says_that_it_is_not_there(
    tmp_path, monkeypatch, server, status, error
):
    monkeypatch.setattr(shards, "STALLED_S", 0.2)
    server.status = status
    url = f"http://127.0.0.1:{server.server_address[1]}/a.tar"
    with pytest.raises(error) as raised:
        open_shard(url, Source(format="cc12m"), Data(cache_folder=str(tmp_path)))
    assert error is Away or raised.value.reason == "shard_missing"
