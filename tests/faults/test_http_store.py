"""Shards over HTTP: whether the server says that one is not there, or does not answer as it should."""

import gzip
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from experiments.vlm.config import Data, Source
from experiments.vlm.data.formats.record_shard import ImageFolder
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.sources.energon import of_split
from experiments.vlm.data.sources.shards import match_files, open_shard
from experiments.vlm.data.storage import remote
from experiments.vlm.data.storage.outages import Away

SILENCE = -1


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Answers(BaseHTTPRequestHandler):
    """The same status to every request; 0: half of a body, then silence; SILENCE from the beginning."""

    def do_GET(self):  # noqa: N802
        if self.server.status == SILENCE:
            return self.server.over.wait()
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
    monkeypatch.setattr(remote, "STALLED_S", 0.2)
    server.status = status
    url = f"http://127.0.0.1:{server.server_address[1]}/a.tar"
    with pytest.raises(error) as raised:
        open_shard(url, Source(format="cc12m"), Data(cache_folder=str(tmp_path)))
    assert error is Away or raised.value.reason == "shard_missing"


@pytest.mark.parametrize("what", ["an image", "whether it is there", "a split", "a listing"])
def test_whatever_stalls_over_http_is_away_as_a_shard_is(tmp_path, monkeypatch, server, what):
    """Where a client keeps its own time limit, this takes five minutes."""
    monkeypatch.setattr(remote, "STALLED_S", 0.2)
    server.status = 0 if what in ("an image", "a split") else SILENCE
    root = f"http://127.0.0.1:{server.server_address[1]}/folder"
    work = {
        "an image": lambda: ImageFolder(root).read("a.png"),
        "whether it is there": lambda: remote.is_file(f"{root}/a.png"),
        "a split": lambda: of_split([f"{root}/.nv-meta/split.yaml"], [f"{root}/a.tar"], "train"),
        "a listing": lambda: match_files(f"{root}/*.tar", (".tar",)),
    }
    with pytest.raises(Away):
        work[what]()


class Lines(BaseHTTPRequestHandler):
    """Twelve megabytes of one letter, of another with each request; `heeds`: pieces of it, as asked for."""

    def do_GET(self):  # noqa: N802
        body = b'{"text": "%s"}\n' % (b"%c" % (97 + self.server.asked) * ((1 << 20) - 13)) * 12
        first, last = 0, len(body) - 1
        self.send_response(206 if self.server.heeds and "Range" in self.headers else 200)
        if self.server.heeds and "Range" in self.headers:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        if self.command == "GET":
            self.server.asked += 1
            self.wfile.write(body[first : last + 1])

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("heeds", [False, True])
def test_a_shard_over_http_is_one_answer_whether_or_not_the_server_sends_pieces(tmp_path, heeds):
    """Python's own sends none; and pieces may be of two files where one took the other's place."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Lines) as serving:
        serving.asked, serving.heeds, serving.daemon_threads = 0, heeds, True
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{serving.server_address[1]}/a.jsonl"
        shard = open_shard(url, Source(format="text"), Data(cache_folder=str(tmp_path)))
        letters = {shard.read(number)[0].parts[0].text[0] for number in range(len(shard))}
        serving.shutdown()
    assert len(shard) == 12 and len(letters) == 1


@pytest.mark.parametrize("name", ["a.jsonl.gz?download=1", "a.jsonl.gz?signature=b.c&of=d"])
def test_an_address_may_have_a_query(tmp_path, name):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "A cat"}\n'))
    handler = partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{serving.server_address[1]}/{name}"
        assert match_files(url, (".jsonl",)) == [url]
        shard = open_shard(url, Source(format="text"), Data(cache_folder=str(tmp_path)))
        serving.shutdown()
    assert [shard.read(number)[0].parts[0].text for number in range(len(shard))] == ["A cat"]


def test_a_glob_or_folder_over_http_means_the_files_of_the_index_page(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    for name in ("1.tar", "2.tar", "notes.txt", "deep/3.tar"):
        (tmp_path / "a" / name).write_bytes(b"x")
    handler = partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{serving.server_address[1]}/a"
        assert match_files(f"{root}/*.tar", (".tar",)) == [f"{root}/1.tar", f"{root}/2.tar"]
        assert match_files(f"{root}/**/3.*", (".tar",)) == [f"{root}/deep/3.tar"]
        in_folder = match_files(f"{root}/", (".tar",), "train")
        assert sorted(in_folder) == [f"{root}/{name}.tar" for name in ("1", "2", "deep/3")]
        assert remote.is_file(f"{root}/1.tar") and not remote.is_file(f"{root}/none.tar")
        serving.shutdown()
