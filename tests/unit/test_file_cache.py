"""Files that were fetched or unpacked once: within a bound, whole, and never made twice."""

import errno
import fcntl
import gc
import gzip
import multiprocessing
import os
import shutil
import threading
import time
from collections import namedtuple
from pathlib import Path

import fsspec
import pytest

from experiments.vlm.config import Data, Source
from experiments.vlm.data.loader import Loader
from experiments.vlm.data.sources.shard_cache import ShardCache
from experiments.vlm.data.sources.shards import open_shard
from experiments.vlm.data.storage import file_cache as file_cache_module
from experiments.vlm.data.storage.fetch import Fetcher
from experiments.vlm.data.storage.file_cache import FileCache, NoRoom, file_cache, no_hurry
from experiments.vlm.data.storage.outages import Retry
from tests.tiny_data import Characters, make_job
from torchtitan.config.errors import ConfigError, StorageError

BLOCK = 4096  # of the disk: what a file takes is a multiple


def size_of(folder):
    return sum(file.stat().st_size for file in folder.glob("??/*"))


def write(blocks):
    return lambda path: path.write_bytes(b"x" * blocks * BLOCK)


def test_the_cache_stays_bounded_and_keeps_what_was_used_last(tmp_path):
    cache = FileCache(tmp_path, limit_bytes=10 * BLOCK)
    for number in range(40):
        cache.get(f"file {number}", write(1))
        cache.get("favourite", write(1))
        time.sleep(0.002)  # so that times differ
        assert size_of(tmp_path) <= 10 * BLOCK
    made = []
    cache.get("favourite", lambda path: made.append(path))
    assert not made


def test_a_file_is_made_once_for_all_and_never_seen_half(tmp_path):
    cache, made, seen = FileCache(tmp_path, 10_000), [], []

    def make(path):
        made.append(path)
        path.write_bytes(b"half")
        time.sleep(0.05)
        path.write_bytes(b"whole")

    threads = [
        threading.Thread(target=lambda: seen.append(cache.get("one", make).read_bytes())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and seen == [b"whole"] * 4


def test_what_could_not_be_made_leaves_nothing_behind(tmp_path):
    cache = FileCache(tmp_path, 10_000)
    with pytest.raises(OSError):
        cache.get("one", lambda path: os.stat(tmp_path / "missing"))
    assert not list(tmp_path.glob("??/*")) and not list(tmp_path.glob("??/.*"))
    assert cache.get("one", lambda path: path.write_bytes(b"1")).read_bytes() == b"1"


def test_a_file_that_somebody_holds_stays_and_counts(tmp_path):
    cache = FileCache(tmp_path, 10 * BLOCK)
    held = [FileCache(tmp_path, 10 * BLOCK).hold(f"held {number}", write(2)) for number in range(3)]
    for number in range(20):
        cache.get(f"file {number}", write(1))
        assert size_of(tmp_path) <= 10 * BLOCK and all(one.path.exists() for one in held)
    for one in held:
        one.close()
    for number in range(20, 40):
        cache.get(f"file {number}", write(1))
    assert not any(one.path.exists() for one in held)


def hold_and_wait(folder, pipe):
    held = FileCache(folder, 10 * BLOCK).hold("theirs", write(6))
    pipe.send(str(held.path))
    pipe.recv()


def test_what_another_process_holds_stays_until_it_ends_however_it_ends(tmp_path):
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold_and_wait, args=(tmp_path, theirs))
    process.start()
    path = ours.recv()
    cache = FileCache(tmp_path, 10 * BLOCK)
    for number in range(10):
        cache.get(f"file {number}", write(3))
        assert os.path.exists(path) and size_of(tmp_path) <= 10 * BLOCK
    process.kill()
    process.join()
    cache.get("last", write(6))
    assert not os.path.exists(path) and size_of(tmp_path) <= 10 * BLOCK


def test_what_a_killed_run_left_half_written_is_thrown_out_and_what_is_being_written_is_not(tmp_path):
    cache = FileCache(tmp_path, 10 * BLOCK)
    left = tmp_path / "ab" / f"{file_cache_module.UNFINISHED}left"
    left.parent.mkdir()
    for path in (left, left.with_name(left.name + ".packed")):
        path.write_bytes(b"x" * 3 * BLOCK)

    def make(path):
        path.write_bytes(b"x" * 2 * BLOCK)
        path.with_name(path.name + ".packed").write_bytes(b"x" * 2 * BLOCK)
        FileCache(tmp_path, 10 * BLOCK).get("another", write(4))
        assert path.exists() and path.with_name(path.name + ".packed").exists()
        path.with_name(path.name + ".packed").unlink()

    cache.get("one", make)
    assert not left.exists() and not left.with_name(left.name + ".packed").exists()
    assert size_of(tmp_path) == 6 * BLOCK


def test_use_does_not_change_a_file_s_own_time(tmp_path):
    """An index of a copy is found again by the copy's time."""
    cache = FileCache(tmp_path, 10 * BLOCK)
    before = cache.get("one", write(1)).stat().st_mtime_ns
    time.sleep(0.01)
    assert cache.get("one", write(1)).stat().st_mtime_ns == before


def fill(monkeypatch, folder, free_blocks):
    """A disk of which so much is free, counted as what the folder takes grows."""
    usage = namedtuple("usage", "total used free")
    disk = size_of(folder) + free_blocks * BLOCK

    def blocks_of(path):
        return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())

    def disk_usage(path):
        return usage(disk, 0, disk - blocks_of(folder))

    monkeypatch.setattr(file_cache_module.shutil, "disk_usage", disk_usage)
    return lambda path, blocks: write_to(path, blocks, disk_usage)


def write_to(path, blocks, disk_usage):
    if disk_usage(path).free < blocks * BLOCK:
        raise OSError(errno.ENOSPC, "No space left on device")
    path.write_bytes(b"x" * blocks * BLOCK)


def test_a_disk_with_less_room_than_the_limit_is_the_limit(tmp_path, monkeypatch):
    put = fill(monkeypatch, tmp_path, 10)
    cache = FileCache(tmp_path, 1 << 40)
    for number in range(20):
        cache.make_room()
        cache.get(f"file {number}", lambda path: put(path, 3))
    assert 6 * BLOCK <= size_of(tmp_path) <= 10 * BLOCK


def test_a_full_disk_is_an_error_once_nothing_more_can_be_thrown_out(tmp_path, monkeypatch):
    put = fill(monkeypatch, tmp_path, 10)
    cache = FileCache(tmp_path, 1 << 40)
    cache.get("unused", lambda path: put(path, 4))
    held = cache.hold("used", lambda path: put(path, 3))
    assert cache.hold("one", lambda path: put(path, 6)), "the unused one made room"
    gc.collect()
    with pytest.raises(OSError, match=r"No space left.*free in .*set data.cache_folder") as error:
        cache.hold("large", lambda path: put(path, 8))
    assert error.value.errno == errno.ENOSPC and held.path.exists()
    assert not list(tmp_path.glob(f"??/{file_cache_module.UNFINISHED}*"))


def test_little_room_is_told_at_the_start(tmp_path, monkeypatch):
    fill(monkeypatch, tmp_path, 1000)
    told = []
    monkeypatch.setattr(file_cache_module, "warn_once", told.append)
    FileCache(tmp_path, 10**9).warn_if_small()
    assert told == [
        f"data.cache_gb = 1, but {tmp_path} has room for 0.0041 GB: that is what copies will take at most"
    ]
    FileCache(tmp_path, 10**6).warn_if_small()
    assert len(told) == 1


@pytest.mark.parametrize("suffix, asked", [("", 0), (".gz", 1)])
def test_free_space_is_looked_at_where_shards_are_copied(tmp_path, monkeypatch, suffix, asked):
    text = b'{"text": "A cat sat on the mat."}\n' * 20
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"a.jsonl{suffix}").write_bytes(gzip.compress(text) if suffix else text)
    job = make_job(tmp_path, tmp_path / "out")
    job.data.sources = [Source(name="texts", format="text", path=str(tmp_path / "data"))]
    told = []
    monkeypatch.setattr(FileCache, "warn_if_small", lambda self: told.append(self.folder))
    Loader(job, Characters()).close()
    assert len(told) == asked


def test_an_address_is_looked_up_without_a_look_at_all_that_is_kept(tmp_path, monkeypatch):
    cache = FileCache(tmp_path, 10**9)
    cache.get("http://a.test/1.jpg", lambda path: path.write_bytes(b"image"), ".image")
    monkeypatch.delattr(FileCache, "_kept")
    assert Fetcher(cache, timeout_s=1, allow_private=False).fetch("http://a.test/1.jpg") == b"image"


@pytest.mark.parametrize("why", ["Not a directory", "No locks available"])
@pytest.mark.parametrize("name", ["packed.jsonl.gz", "addresses.jsonl"])
def test_a_folder_where_no_copies_can_be_kept_is_refused_at_the_start(tmp_path, monkeypatch, why, name):
    """It would else be taken for an outage of the shards, and waited for, or for damage to them."""
    record = b'{"texts": ["A cat", null], "images": [null, "http://127.0.0.1:9/1.jpg"]}\n'
    (tmp_path / name).write_bytes(gzip.compress(record) if name.endswith(".gz") else record)
    job = make_job(tmp_path, tmp_path / "out", cache_folder=str(tmp_path / "cache"))
    job.data.sources = [Source(name="documents", format="obelics", path=str(tmp_path / name))]
    if why == "Not a directory":
        (tmp_path / "cache").touch()
    else:

        def flock(file, how):
            raise OSError(errno.ENOLCK, why)

        monkeypatch.setattr(file_cache_module.fcntl, "flock", flock)
    with pytest.raises(ConfigError, match=f"^data.cache_folder = {tmp_path}/cache/copies: .*{why}.*folder$"):
        Loader(job, Characters())


@pytest.fixture
def remote():
    system = fsspec.filesystem("memory")
    system.store.clear()
    for number in range(12):
        system.pipe(f"/{number}.jsonl", b'{"text": "' + b"x" * (2 * BLOCK - 20) + b'"}\n')
    yield [f"memory:///{number}.jsonl" for number in range(12)]
    system.store.clear()


def peak_of(folder, monkeypatch):
    """What files of the folder took on the disk whenever one was locked; none is open without a name."""
    peaks, true_flock = [0], fcntl.flock

    def flock(file, how):
        true_flock(file, how)
        open_files = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
        nameless = [path for path in open_files if path.startswith(str(folder)) and "(deleted)" in path]
        assert not nameless, "a file that is open was deleted"
        peaks.append(size_of(folder))

    monkeypatch.setattr(file_cache_module.fcntl, "flock", flock)
    return peaks


@pytest.mark.parametrize("packed", [False, True])
def test_shards_that_are_open_stay_within_the_limit(tmp_path, remote, monkeypatch, packed):
    data = Data(cache_folder=str(tmp_path), cache_gb=7 * BLOCK / 1e9)
    peaks = peak_of(tmp_path / "copies", monkeypatch)
    if packed:  # how large one gets, nobody knows before
        system, names = fsspec.filesystem("memory"), [f"{number}.jsonl" for number in range(len(remote))]
        remote = [str(tmp_path / f"{name}.gz") for name in names]
        for name, path in zip(names, remote, strict=True):
            Path(path).write_bytes(gzip.compress(system.cat(name)))
    cache = ShardCache(lambda _, path: open_shard(path, Source(format="text"), data), 100, Retry(0))
    for _ in range(2):
        for path in remote:
            assert cache.use(0, path, lambda shard: shard.read(0)[0].parts[0].text[0]) == "x"
    cache.close()
    assert 4 * BLOCK < max(peaks) <= 7 * BLOCK


def test_a_shard_opened_ahead_takes_no_room_of_one_in_use(tmp_path, remote):
    data = Data(cache_folder=str(tmp_path), cache_gb=7 * BLOCK / 1e9)
    cache = ShardCache(lambda _, path: open_shard(path, Source(format="text"), data), 100, Retry(0))
    for path in remote[:3]:
        cache.use(0, path, len)
    cache.ahead(0, remote[3])
    cache.openers.submit(len, ()).result()
    cache.openers.shutdown()
    assert {path for _, path in cache.kept} == set(remote[:3])
    assert cache.use(0, remote[3], len) == 1, "now it is needed"
    assert {path for _, path in cache.kept} == {*remote[1:4]}
    cache.close()


def test_no_hurry_takes_room_of_what_nobody_holds_alone(tmp_path):
    cache = FileCache(tmp_path, 4 * BLOCK)
    cache.get("unused", write(2))
    held = cache.hold("used", write(2))
    token = no_hurry.set(True)
    try:
        cache.get("another", write(2))
        with pytest.raises(NoRoom):
            cache.make_room(3 * BLOCK)
    finally:
        no_hurry.reset(token)
    assert held.path.exists() and not list(tmp_path.glob(f"??/{file_cache_module.UNFINISHED}*"))


def test_a_cache_on_a_full_disk_stops_the_run_with_one_line(tmp_path, remote, monkeypatch):
    data = Data(cache_folder=str(tmp_path))
    monkeypatch.setattr(
        file_cache(data),
        "make_room",
        lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")),
    )
    cache = ShardCache(lambda _, path: open_shard(path, Source(format="text"), data), 100, Retry(600))
    with pytest.raises(
        StorageError, match=r"^memory:///0.jsonl: OSError: \[Errno 28\] No space left"
    ) as error:
        cache.use(0, remote[0], len)
    assert "\n" not in str(error.value) and "set data.cache_folder" in str(error.value)


def test_a_cache_folder_that_is_deleted_is_filled_again(tmp_path, remote):
    data = Data(cache_folder=str(tmp_path))
    cache = ShardCache(lambda _, path: open_shard(path, Source(format="text"), data), 1, Retry(600))
    assert cache.use(0, remote[0], len) == 1
    shutil.rmtree(tmp_path / "copies")
    assert [cache.use(0, path, len) for path in (remote[1], remote[0])] == [1, 1]
