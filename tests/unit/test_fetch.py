"""Images by their address, from a server that misbehaves in the ways of the web."""

import contextlib
import json
import shutil
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from experiments.vlm.config import Data, Source
from experiments.vlm.data.loader import Loader
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.sources.shards import open_shard
from experiments.vlm.data.storage import fetch
from experiments.vlm.data.storage.fetch import Fetcher
from experiments.vlm.data.storage.file_cache import FileCache
from tests.samples import jpeg
from tests.tiny_data import Characters, make_job

IMAGE = jpeg(20, 30)
TIMEOUT_S = 0.6  # where a timeout is the point
PATIENCE_S = 60.0  # where it is not: a busy machine may take its time


class Handler(BaseHTTPRequestHandler):
    asked: Counter = Counter()
    released: threading.Event
    meeting: threading.Barrier

    def do_GET(self):
        Handler.asked[self.path] += 1
        name = self.path.strip("/").partition("/")[0].partition("?")[0]
        getattr(self, f"do_{name}", self.do_image)()

    def do_image(self, length=None, body=IMAGE, status=200, **headers):
        with contextlib.suppress(OSError):
            self.send_response(status)
            for key, value in {"Content-Length": len(body) if length is None else length, **headers}.items():
                self.send_header(key, str(value))
            self.end_headers()
            self.wfile.write(body)

    def do_gone(self):
        self.do_image(status=404)

    def do_broken(self):
        self.do_image(status=500)

    def do_short(self):
        self.do_image(length=len(IMAGE) + 500)

    def do_huge(self):
        self.do_image(body=b"x" * 5000)

    def do_moved(self):
        self.do_image(status=302, body=b"", Location="/image/after/moving")

    def do_circle(self):
        self.do_image(status=302, body=b"", Location="/circle")

    def do_inside(self):
        self.do_image(
            status=302, body=b"", Location=f"http://localhost:{self.server.server_port}/image/inside"
        )

    def do_down(self):
        """Broken at first, sound ever after."""
        first = Handler.asked[self.path] == 1
        time.sleep(0.15 if first else 0)  # so that who else asks finds it under way
        self.do_image(status=500 if first else 200)

    def do_file(self):
        self.do_image(status=302, body=b"", Location="file:///etc/hostname")

    def do_silent(self):
        """Says nothing until the test has seen that nobody waits for it."""
        Handler.released.wait()

    def do_drip(self):
        """A header that never ends, each byte of it within the time limit of a read."""
        with contextlib.suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            while not Handler.released.wait(TIMEOUT_S / 4):
                self.wfile.write(b"x")

    def do_together(self):
        """Answers once three have asked."""
        Handler.meeting.wait()
        self.do_image()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()


@pytest.fixture
def fetcher(tmp_path):
    return patient(tmp_path)


def patient(folder, allow_private=True):
    return Fetcher(FileCache(folder, 1 << 20), PATIENCE_S, allow_private)


@pytest.fixture(autouse=True)
def fresh_handler():
    Handler.asked.clear()
    Handler.released, Handler.meeting = threading.Event(), threading.Barrier(3)
    yield
    Handler.released.set()


def failed(fetcher, url):
    with pytest.raises(Rejected) as error:
        fetcher.fetch(url)
    return error.value.reason


@pytest.mark.parametrize("path", ["/image/1.jpg", "/moved", "/image/ä b?c=d e&f=ü#part"])
def test_an_image_is_fetched_once_and_kept(server, fetcher, tmp_path, path):
    assert fetcher.fetch(server + path) == IMAGE
    asked = Handler.asked.copy()
    assert fetcher.fetch(server + path) == IMAGE
    again = patient(tmp_path)  # after a restart
    assert again.fetch(server + path) == IMAGE
    assert Handler.asked == asked


@pytest.mark.parametrize("path", ["/gone", "/broken", "/short", "/circle", "/silent", "/drip"])
def test_what_fails_is_not_waited_for_and_not_tried_again(server, tmp_path, path):
    """The silent and the dripping end only when the test has ended:
    to come back at all is to have given up.
    """
    fetcher = Fetcher(FileCache(tmp_path, 1 << 20), TIMEOUT_S, allow_private=True)
    assert failed(fetcher, server + path) == "image_fetch"
    asked = Handler.asked.copy()
    assert failed(fetcher, server + path) == "image_fetch"
    assert Handler.asked == asked


def again(fetcher, **options) -> Fetcher:
    """Another process, or another run."""
    return Fetcher(
        FileCache(fetcher.cache.folder, 1 << 20),
        **({"timeout_s": PATIENCE_S, "allow_private": True} | options),
    )


def test_an_address_that_failed_has_failed_for_every_rank_and_later_run(server, fetcher):
    assert failed(fetcher, server + "/down") == "image_fetch"
    with pytest.raises(Rejected, match=f"http_500 .remembered in {fetcher.failures.folder}") as error:
        again(fetcher).fetch(server + "/down")
    assert error.value.reason == "image_fetch" and Handler.asked["/down"] == 1


def test_two_that_ask_at_the_same_moment_get_the_outcome_of_the_first(server, fetcher):
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda one: one._fetched(server + "/down"), [fetcher, again(fetcher)]))
    assert outcomes == [False, False] and Handler.asked["/down"] == 1


def test_what_failed_is_asked_again_after_its_notes_are_deleted_or_with_another_timeout(server, fetcher):
    for path in ("/down/1", "/down/2"):
        assert failed(fetcher, server + path) == "image_fetch"
    assert again(fetcher, timeout_s=2 * PATIENCE_S).fetch(server + "/down/1") == IMAGE
    shutil.rmtree(fetcher.failures.folder)
    assert again(fetcher).fetch(server + "/down/2") == IMAGE


def test_a_refusal_is_not_remembered_once_private_addresses_are_allowed(server, fetcher):
    assert failed(again(fetcher, allow_private=False), server + "/image/1") == "image_address"
    assert fetcher.fetch(server + "/image/1") == IMAGE


def test_more_bytes_than_an_image_may_have_are_not_read(server, fetcher, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", 4000)
    assert failed(fetcher, server + "/huge") == "image_too_large"


@pytest.mark.parametrize(
    "url", ["ftp://example.org/1.jpg", "file:///etc/hostname", "http://", "http:///1.jpg"]
)
def test_only_http_is_fetched(fetcher, url):
    assert failed(fetcher, url) == "image_address"


def test_a_redirect_to_a_file_is_refused(server, fetcher):
    assert failed(fetcher, server + "/file") == "image_address"


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1/1.jpg",
        "http://host:port/1.jpg",
        "http://a b/1.jpg",
        "http://" + "a" * 300 + "/",
        "http://\ud800/",
    ],
)
def test_an_address_that_cannot_be_read_is_rejected(fetcher, url):
    assert failed(fetcher, url) in ("image_address", "image_fetch")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "0.0.0.0",
        "10.1.2.3",
        "192.168.0.1",
        "169.254.169.254",
        "[fe80::1]",
        "2130706433",
    ],
)
def test_private_addresses_are_refused_however_they_are_written(server, tmp_path, host):
    fetcher = patient(tmp_path, allow_private=False)
    assert failed(fetcher, f"http://{host}:{server.rpartition(':')[2]}/image") in (
        "image_address",
        "image_fetch",
    )
    assert not Handler.asked


def resolve_as(monkeypatch, table):
    true_lookup = socket.getaddrinfo

    def lookup(host, *about, **options):
        return true_lookup(table.get(host, host), *about, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)


def test_a_name_that_resolves_to_a_private_address_is_refused(server, tmp_path, monkeypatch):
    resolve_as(monkeypatch, {"images.example": "127.0.0.1"})
    fetcher = patient(tmp_path, allow_private=False)
    assert failed(fetcher, f"http://images.example:{server.rpartition(':')[2]}/image") == "image_address"
    assert not Handler.asked


def test_a_redirect_to_a_private_address_is_refused(server, tmp_path, monkeypatch):
    """The first host passes for public; the second is looked at all the same."""
    fetcher = patient(tmp_path, allow_private=False)
    true_permits = type(fetcher.gate).permits
    permitted = iter([True])
    monkeypatch.setattr(
        type(fetcher.gate), "permits", lambda gate, text: next(permitted, None) or true_permits(gate, text)
    )
    assert failed(fetcher, server + "/inside") == "image_address"
    assert dict(Handler.asked) == {"/inside": 1}


def test_images_of_a_document_are_fetched_at_one_time(server, fetcher):
    """One by one, each would wait in vain for the others to ask."""
    urls = [f"{server}/together/{number}" for number in range(3)]
    fetcher.fetch_ahead(urls)
    assert [fetcher.fetch(url) for url in urls] == [IMAGE] * 3
    assert set(Handler.asked.values()) == {1}


def test_a_document_keeps_what_its_addresses_give(server, tmp_path):
    record = {
        "texts": [None, "one", None, None],
        "images": [server + "/image/7", None, server + "/gone", {"url": server + "/image/8"}],
    }
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    data = Data(cache_folder=str(tmp_path), url_timeout_s=PATIENCE_S, allow_private_urls=True)
    shard = open_shard(str(tmp_path / "x.jsonl"), Source(format="obelics"), data)
    document, lost = shard.read(0)
    assert [shard.load(document.parts[place]) for place in (0, 2)] == [IMAGE, IMAGE]
    assert [(reject.reason, reject.image) for reject in lost] == [("image_fetch", 1)]
    closed = Data(cache_folder=str(tmp_path / "other"), url_timeout_s=PATIENCE_S)
    assert {
        reject.reason
        for reject in open_shard(str(tmp_path / "x.jsonl"), Source(format="obelics"), closed).read(0)[1]
    } == {"image_address"}


def test_batches_stay_equal_whatever_an_address_answers_later(server, tmp_path, caplog):
    """One rank first, then two: what was down in the first run is up in the second."""
    (tmp_path / "data").mkdir()
    names = [f"{'down' if number % 3 else 'image'}/batches/{number}" for number in range(12)]
    lines = [
        json.dumps({"texts": [None, f"about {name}"], "images": [f"{server}/{name}", None]}) for name in names
    ]
    (tmp_path / "data" / "x.jsonl").write_text("\n".join(lines))
    runs = []
    for ranks in (1, 2):
        fetch._make_fetcher.cache_clear()  # as in a process of its own
        job = make_job(
            tmp_path,
            tmp_path / "out",
            epochs=1,
            global_batch_size=2,
            local_batch_size=1,
            url_timeout_s=PATIENCE_S,
        )
        job.data.allow_private_urls = True
        job.data.sources = [Source(format="obelics", path=str(tmp_path / "data"))]
        loaders = [Loader(job, Characters(), rank=rank, ranks=ranks, agree=bool) for rank in range(ranks)]
        steps = [batch for loader in loaders for step in loader for batch in step.batches]
        runs.append(
            sorted((sample.key, len(sample.image_sizes)) for batch in steps for sample in batch.samples)
        )
        for loader in loaders:
            loader.close()
    assert runs[0] == runs[1] and [images for _, images in runs[0]].count(0) == 8
    assert (
        sum("images by address: what did not answer stays left out" in message for message in caplog.messages)
        == 3
    )
