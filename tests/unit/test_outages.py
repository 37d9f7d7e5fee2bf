"""Storage that is away is waited for, and only that; the clock is one of the test's own."""

import errno
import gzip
import threading
import zlib
from pathlib import Path

import pytest

from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.sources.shard_cache import ShardCache, guarded
from experiments.vlm.data.storage import outages
from experiments.vlm.data.storage.client import Stopped
from experiments.vlm.data.storage.outages import Away, Retry, is_away, remote
from torchtitan.config.errors import StorageError


class Time:
    """Passes only where somebody waits."""

    def __init__(self, monkeypatch):
        self.now, self.pauses = 1000.0, []
        monkeypatch.setattr(outages, "clock", lambda: self.now)
        monkeypatch.setattr(Retry, "rest", lambda _, seconds: self.rest(seconds))

    def rest(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def time(monkeypatch):
    return Time(monkeypatch)


class HTTPError(Exception):
    def __init__(self, status):
        super().__init__(f"status {status}")
        self.status = status


OUTAGES = [
    *(OSError(number, "") for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE)),
    PermissionError("expired"),
    TimeoutError("slow"),
    ConnectionResetError("reset"),
    HTTPError(429),
    HTTPError(503),
    HTTPError(403),
    ValueError("no JSON in the answer"),
]


def failing(times, error):
    """Fails so often, then gives what went before."""
    failed = []

    def attempt():
        if len(failed) < times:
            failed.append(error)
            with remote():
                raise error
        return len(failed)

    return attempt


@pytest.mark.parametrize("error", OUTAGES, ids=lambda error: repr(error))
def test_an_outage_is_waited_for_with_growing_pauses(time, error):
    assert Retry(600).call("a.tar", failing(8, error)) == 8
    assert time.pauses[0] < 1 and min(time.pauses[5:7]) > 7 and max(time.pauses) <= 45


@pytest.mark.parametrize("timeout_s", [0, 1, 600])
def test_a_storage_that_stays_away_is_given_up_after_that_time_in_one_line(time, timeout_s):
    with pytest.raises(StorageError) as error:
        Retry(timeout_s).call("a.tar", failing(10**6, Away("503\nbusy")))
    assert time.now - 1000 == pytest.approx(timeout_s)
    assert str(error.value) == (
        f"a.tar: the storage has not answered for {timeout_s} s (data.storage_timeout_s = {timeout_s}): "
        "503 busy"
    )


def test_the_time_counts_from_the_first_failure_in_a_row(time):
    waits = Retry(100)
    for _ in range(20):
        assert waits.call("a.tar", failing(6, OSError(errno.EIO, "")))
    assert time.now - 1000 > 200


def test_an_outage_is_told_once_a_minute(time, caplog, monkeypatch):
    said = []
    monkeypatch.setattr(outages.logger, "warning", said.append)
    waits = Retry(600)
    for _ in range(2):
        with pytest.raises(StorageError):
            waits.call("a.tar", failing(10**6, OSError(errno.EIO, "Input/output error")))
    assert 19 <= len(said) <= 21
    assert said[0] == (
        "a.tar: the storage does not answer (OSError: [Errno 5] Input/output error); tried again for another "
        "600 s (data.storage_timeout_s)"
    )


def test_a_full_disk_is_not_waited_for(time):
    with pytest.raises(StorageError, match=r"a.tar: OSError: \[Errno 28\]"):
        Retry(600).call("a.tar", failing(1, OSError(errno.ENOSPC, "No space left on device")))
    assert not time.pauses


def broken_gzip():
    return gzip.decompress(b"no gzip")


def missing(status):
    with remote():
        raise HTTPError(status)


@pytest.mark.parametrize(
    "attempt",
    [
        broken_gzip,
        lambda: Path("/nowhere/at/all").read_bytes(),
        lambda: Path("/").read_bytes(),
        lambda: Path("x" * 300).read_bytes(),
        lambda: missing(404),
        lambda: missing(410),
        lambda: zlib.decompress(b"x"),
    ],
)
def test_what_is_damaged_or_not_there_is_not_waited_for(time, attempt):
    with pytest.raises((OSError, zlib.error)) as error:
        Retry(600).call("a.tar", attempt)
    assert not isinstance(error.value, StorageError) and not time.pauses and not is_away(error.value)
    with pytest.raises(Rejected):
        guarded(attempt)


class Opened:
    """A shard whose file is stale after an outage."""

    def __init__(self, store):
        self.store, self.rejects, self.born = store, [], store.outages
        store.opened += 1
        if store.away:
            store.away -= 1
            raise OSError(errno.EIO, "away")

    def read(self, index):
        if self.store.reads_until_stale == 0:
            self.store.outages, self.store.away, self.store.reads_until_stale = 1, 3, -1
        self.store.reads_until_stale -= 1
        if self.born < self.store.outages:
            raise OSError(errno.ESTALE, "Stale file handle")
        return index

    def close(self):
        pass


def test_a_shard_whose_file_went_stale_is_opened_anew(time):
    class Store:
        outages = opened = away = 0
        reads_until_stale = 2

    store = Store()
    cache = ShardCache(lambda source, path: Opened(store), 2, Retry(600))
    assert [cache.use(0, "a.tar", lambda shard, i=i: shard.read(i)) for i in range(5)] == [0, 1, 2, 3, 4]
    assert store.opened == 1 + 3 + 1 and len(time.pauses) == 4


@pytest.mark.parametrize("ahead", [False, True])
def test_shards_that_are_kept_open_give_way_where_a_process_may_open_no_more_files(time, ahead):
    store, lock = [], threading.Lock()

    class File(list):
        rejects, checksum = (), 0

        def __init__(self, path):
            with lock:
                if len(store) == 5:
                    raise OSError(errno.EMFILE, "Too many open files")
                store.append(path)
            self.append(path)

        def close(self):
            with lock:
                store.remove(self[0])

    cache, paths = ShardCache(lambda source, path: File(path), 100, Retry(600)), [*"abcdefghijklmnopqrst"]
    for path in paths if ahead else ():
        cache.ahead(0, path)
    assert [cache.use(0, path, list) for path in paths * 2] == [[path] for path in paths * 2]
    assert time.now - 1000 < 200, "nobody waits for what only the others could give"
    cache.close()


def test_a_thread_that_waits_ends_when_nobody_waits_any_more():
    waits = Retry(600)
    waits.end()
    with pytest.raises(Stopped):
        waits.call("a.tar", failing(10**6, OSError(errno.EIO, "")))
