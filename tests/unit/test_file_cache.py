"""Files that were fetched or unpacked once: within a bound, whole, and never made twice."""

import os
import threading
import time

import pytest

from experiments.vlm.data.storage.file_cache import FileCache


def size_of(folder):
    return sum(file.stat().st_size for file in folder.glob("??/*"))


def test_the_cache_stays_bounded_and_keeps_what_was_used_last(tmp_path):
    cache = FileCache(tmp_path, limit_bytes=1000)
    for number in range(40):
        cache.get(f"file {number}", lambda path: path.write_bytes(b"x" * 90))
        cache.get("favourite", lambda path: path.write_bytes(b"y" * 90))
        time.sleep(0.002)  # so that times differ
        assert size_of(tmp_path) <= 1000 + 90
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
