"""Two machines, rehearsed as two launchers that meet on the loopback address; and a rank that hangs, named by
the others.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
OPTIONS = [
    "--optimizer.name", "AdamW", "--optimizer.eps", "1e-6", "--training.global_batch_size", "4",
    "--training.seq_len", "256", "--data.patches_per_row", "512", "--metrics.log_freq", "1",
    "--metrics.no_enable_tensorboard", "--metrics.no_save_plot",
    "--validation.no_enable", "--validation.no_controls", "--data.packing_buffer_size", "32",
]  # fmt: skip

BLAME = r"rank 0 failed in step (\d+); rank 1 does not answer since it began step (\d+)"

pytestmark = pytest.mark.slow


def launch(folder: Path, log: str, *options: str, **variables: str) -> subprocess.Popen:
    python = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{python}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | variables
    environment.pop("VENV", None)
    command = [str(REPOSITORY / "run_train.sh"), "--job.dump_folder", str(folder), *OPTIONS, *options]
    with open(folder / log, "w") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def finish(*processes: subprocess.Popen) -> list[int]:
    try:
        return [process.wait() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                kill_with_children(process)


def losses(text: str) -> dict[int, tuple[float, float]]:
    lines = re.findall(r"^step: (\d+) loss: ([\d.]+) grad_norm: ([\d.]+)", text, re.MULTILINE)
    return {int(step): (float(loss), float(norm)) for step, loss, norm in lines}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_two_launchers_train_as_one_process(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    steps = ["--training.steps", "4"]
    assert finish(launch(one, "log.txt", *steps, "--training.local_batch_size", "4", NGPU="1")) == [0], (
        one / "log.txt"
    ).read_text()
    layout = ["--parallelism.pipeline_parallel_degree", "2", "--parallelism.context_parallel_degree", "2"]
    where = {"NGPU": "2", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nodes = [
        launch(
            two,
            f"node{node}.txt",
            *steps,
            *layout,
            "--training.local_batch_size",
            "4",
            NODE_RANK=str(node),
            **where,
        )
        for node in (0, 1)
    ]
    assert finish(*nodes) == [0, 0], (two / "node0.txt").read_text() + (two / "node1.txt").read_text()
    expected, found = losses((one / "log.txt").read_text()), losses((two / "node0.txt").read_text())
    assert sorted(found) == [1, 2, 3, 4]
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=2e-5)  # five decimals are printed
    assert not losses((two / "node1.txt").read_text()), "rank 0 alone prints"


def kill_with_children(launcher: subprocess.Popen) -> None:
    """The ranks too: the launcher gives each a session of its own."""
    for process in [*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)]:
        process.kill()


def rank_process(launcher: subprocess.Popen, rank: int) -> psutil.Process:
    for process in psutil.Process(launcher.pid).children(recursive=True):
        if process.environ().get("RANK") == str(rank):
            return process
    raise AssertionError(f"no rank {rank}")


def test_a_rank_that_hangs_is_named_with_its_step(tmp_path):
    run = launch(
        tmp_path, "log.txt", "--training.steps", "100000", "--comm.train_timeout_seconds", "5", NGPU="2"
    )
    stuck = None
    try:
        log = tmp_path / "log.txt"
        while 3 not in losses(log.read_text()):
            assert run.poll() is None, log.read_text()
            time.sleep(0.2)
        stuck = rank_process(run, 1)
        stuck.send_signal(signal.SIGSTOP)
        while not (told := re.search(BLAME, log.read_text())) and run.poll() is None:
            time.sleep(0.2)
        assert told and abs(int(told[1]) - int(told[2])) <= 1, log.read_text()[-3000:]
        while not list((tmp_path / "comm_traces").glob("rank_0*")):
            assert run.poll() is None, "no flight record of the rank that waited"
            time.sleep(0.2)
    finally:
        if stuck is not None:
            stuck.kill()
        kill_with_children(run)
