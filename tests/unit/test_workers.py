"""However a worker or the trainer ends, there is one clear error and no process is left."""

import os
import signal
import subprocess
import sys
import time

import pytest

from experiments.vlm.data.loader import Loader
from experiments.vlm.data.workers import Worker
from tests.tiny_data import Characters, Stumbling, make_job, write_all

TRAINER = """
import sys, time
from pathlib import Path
from experiments.vlm.data.loader import Loader
from tests.tiny_data import Characters, make_job

if __name__ == "__main__":
    job = make_job(Path(sys.argv[1]), Path(sys.argv[2]), num_workers=2)
    loader = Loader(job, Characters())
    next(loader)
    print(*(worker.process.pid for worker in loader.supply.forwards.workers), flush=True)
    if sys.argv[3] == "stay":
        while True:
            next(loader)
            time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


def wait_for_end(pids: list[int]) -> None:
    """Until all are gone, or wait to be reaped."""
    while any(alive(pid) for pid in pids):
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_worker_is_told_and_the_others_end(data, tmp_path):
    loader = Loader(make_job(data, tmp_path, num_workers=2), Characters())
    next(loader)
    pids = [worker.process.pid for worker in loader.supply.forwards.workers]
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(
        RuntimeError, match=r"data worker 1 \(slots 1\) was killed by SIGKILL: out of memory\?"
    ):
        for _ in range(10):
            next(loader)
    loader.close()
    wait_for_end(pids)
    loader.close()


def test_an_error_inside_a_worker_comes_with_its_traceback(data, tmp_path):
    loader = Loader(make_job(data, tmp_path, num_workers=1), Stumbling())
    with pytest.raises(
        RuntimeError,
        match=r"(?s)data worker 0 \(slots 0, 1\) failed:.*encode.*ZeroDivisionError: in the tokenizer",
    ):
        for _ in range(50):
            next(loader)
    loader.close()


@pytest.mark.parametrize(
    "end",
    ["SIGKILL", *(pytest.param(end, marks=pytest.mark.slow) for end in ("SIGINT", "SIGTERM", "exit"))],
)
def test_workers_end_with_the_trainer(data, tmp_path, end):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    command = [sys.executable, str(script), str(data), str(tmp_path), "leave" if end == "exit" else "stay"]
    trainer = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        start_new_session=True,
    )
    try:
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(pids) == 2
        if end != "exit":
            os.killpg(trainer.pid, signal.Signals[end]) if end != "SIGKILL" else os.kill(
                trainer.pid, signal.SIGKILL
            )
        _, errors = trainer.communicate()
        wait_for_end(pids)
        # Only the trainer itself may report Ctrl-C.
        assert errors.count("Traceback") == (1 if end == "SIGINT" else 0), errors
    finally:
        trainer.kill()


def test_more_workers_than_slots_become_threads(data, tmp_path, monkeypatch):
    started = []

    class NoWorker(Worker):
        def __init__(self, number, setup, buffers, assignment):
            started.append((assignment.slots, setup.data.decode_threads))
            self.pipe = self

        def hang_up(self):
            pass

        def close(self, deadline=0.0):
            pass

    monkeypatch.setattr("experiments.vlm.data.prefetch.Worker", NoWorker)
    loader = Loader(make_job(data, tmp_path, num_workers=5, decode_threads=2), Characters())
    loader.supply = loader._start()
    assert started == [([0], 5), ([1], 5)]
    loader.close()
