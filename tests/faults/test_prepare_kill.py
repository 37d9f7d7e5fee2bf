"""Killed at any moment, a run goes on: nothing that arrived is fetched again, and the shards are equal."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.faults.hostile_server import HostileServer
from tests.faults.prepared import QUICK_OPTIONS, bytes_of, command, run, samples, written
from tests.samples import write_jsonl

KILLS = 10


def documents(server: HostileServer, images: int) -> list[dict]:
    """Two slow images each, a bad one now and then."""
    paths = [
        f"slow/{number}" if number % 7 else f"status/{410 + number % 3}?{number}" for number in range(images)
    ]
    urls = [server.url(path) for path in paths]
    return [{"texts": [str(n), None, None], "images": [None, *urls[n : n + 2]]} for n in range(0, images, 2)]


def deliveries(server: HostileServer) -> Counter:
    return Counter(server.stats()["deliveries"])


def wait_until(met, running=lambda: True) -> None:
    """However long it takes, as long as what could still meet it is running."""
    while not met():
        assert running() or met(), "it ended before"
        time.sleep(0.005)


def start(source: Path, out: Path, **options) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=run, args=(source, out), kwargs=options)
    process.start()
    return process


def journalled(out: Path) -> set[str]:
    found = set()
    for file in out.glob(".prepare/journal/*/*.jsonl"):
        for line in file.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                found.add(json.loads(line)["url"])
    return found


def children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def test_killed_ten_times_nothing_is_fetched_twice(tmp_path):
    already = children()  # of other tests: multiprocessing keeps a server for each way to start
    with HostileServer() as server:
        source = write_jsonl(tmp_path / "a.jsonl", documents(server, 120))
        for kill in range(KILLS):
            process = start(source, tmp_path / "out", records_per_shard=25, concurrency=8)
            wait_until(lambda goal=9 * (kill + 1): deliveries(server).total() >= goal, process.is_alive)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        report = run(source, tmp_path / "out", records_per_shard=25, concurrency=8)
        counts = deliveries(server)
        assert counts.total() == written(report, "images") == 102
        assert set(counts.values()) == {1}, "something was fetched twice"

        run(source, tmp_path / "straight", records_per_shard=25)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "straight")
    assert children() <= already


def has_ended(process: psutil.Process) -> bool:
    """Also where nobody waits for it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_even_when_the_working_process_is_killed_what_is_on_disk_is_not_fetched_again(tmp_path):
    """Power failure, out of memory: what was on the wire is lost, and nothing more."""
    with HostileServer() as server:
        source, killed = write_jsonl(tmp_path / "a.jsonl", documents(server, 100)), 0
        for kill in range(4):
            process = start(source, tmp_path / "out", records_per_shard=25, concurrency=8)
            wait_until(lambda goal=15 * (kill + 1): deliveries(server).total() >= goal, process.is_alive)
            workers = psutil.Process(process.pid).children()  # none, where the machine let it finish first
            process.kill()
            for worker in workers:
                worker.kill()
            process.join()
            wait_until(lambda workers=workers: all(map(has_ended, workers)))
            killed += len(workers)
        assert killed
        on_disk = journalled(tmp_path / "out")
        before = server.stats()["requests"]
        report = run(source, tmp_path / "out", records_per_shard=25, concurrency=8)
        after = server.stats()["requests"]
        again = {path for path in before if after[path] > before[path]}
        assert not {server.url(path.lstrip("/")) for path in again} & on_disk
        assert written(report, "images") == len({path for path in after if path.startswith("/slow")})

        run(source, tmp_path / "straight", records_per_shard=25)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_an_interrupted_run_says_how_to_go_on(tmp_path, number):
    """Through the script."""
    with HostileServer() as server:
        source = write_jsonl(tmp_path / "a.jsonl", documents(server, 400))
        started = command(source, tmp_path / "out", "--concurrency", "4")
        process = subprocess.Popen(started, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: deliveries(server).total() >= 20, lambda: process.poll() is None)
        process.send_signal(number)
        _, said = process.communicate()
        assert process.returncode == 128 + number
        assert f"stopped by {number.name}; the same command goes on" in said and "Traceback" not in said
        counts = deliveries(server)
        assert counts.total() < 300 and {server.url(path.lstrip("/")) for path in counts} <= journalled(
            tmp_path / "out"
        )


@pytest.mark.slow
def test_the_script_killed_ten_times_at_any_moment(tmp_path):
    with HostileServer() as server:
        source = write_jsonl(tmp_path / "a.jsonl", documents(server, 600))
        started = command(source, tmp_path / "out", "--records_per_shard", "50", *QUICK_OPTIONS)
        for kill in range(KILLS):
            process = subprocess.Popen(started, stderr=subprocess.PIPE)
            wait_until(
                lambda goal=45 * (kill + 1): deliveries(server).total() >= goal,
                lambda running=process: running.poll() is None,
            )
            process.kill()
            process.communicate()
        assert subprocess.run(started, stderr=subprocess.DEVNULL).returncode == 0
        counts = deliveries(server)
    assert set(counts.values()) == {1}
    assert sum(len(sample) - 1 for sample in samples(tmp_path / "out").values()) == counts.total() == 514
