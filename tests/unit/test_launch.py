"""The launcher of several ranks: their variables, the exit code of the first that failed, signals."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from torchtitan.config.errors import ConfigError
from torchtitan.config.job import Comm
from torchtitan.distributed.process_group import open_process_group
from torchtitan.launch import hold_port

REPOSITORY = Path(__file__).parents[2]
# What a rank does, after it has told its variables in a file of its own.
RANK = """
import os, signal, sys, time
from pathlib import Path
from torchtitan.tools.error_line import report_error
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
def stay():
    def stop(number, frame):
        (folder / f"stopped{rank}").write_text(signal.Signals(number).name)
        sys.exit(128 + number)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    (folder / f"ready{rank}").touch()
    while True:
        time.sleep(1)
def others_wait():
    while not (folder / f"ready{1 - rank}").exists():
        time.sleep(0.01)
(folder / f"variables{rank}").write_text(" ".join(os.environ[name] for name in names))
"""


@pytest.fixture
def start(tmp_path):
    started = []

    def launch(what: str, *arguments: str) -> subprocess.Popen:
        (tmp_path / "a_rank.py").write_text(RANK + what)
        environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}"}
        command = [
            sys.executable,
            "-m",
            "torchtitan.launch",
            *(arguments or ("--processes", "2")),
            "a_rank",
            str(tmp_path),
        ]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen) -> tuple[int, str]:
    _, errors = process.communicate()
    return process.returncode, errors


def test_ranks_get_the_variables_of_torchrun(start, tmp_path):
    assert end(start("")) == (0, "")
    first, second = ((tmp_path / f"variables{rank}").read_text().split() for rank in (0, 1))
    assert first[:4] == ["0", "0", "2", "2"] and second[:4] == ["1", "1", "2", "2"]
    assert first[4:] == second[4:] and first[4] == "127.0.0.1" and int(first[5]) > 0


def test_the_second_machine_has_the_ranks_after_those_of_the_first(start, tmp_path):
    where = ("--processes", "2", "--machines", "2", "--machine", "1", "--address", "first", "--port", "1234")
    assert end(start("", *where)) == (0, "")
    assert (tmp_path / "variables3").read_text() == "3 1 4 2 first 1234"


def test_what_every_rank_says_is_told_once_with_its_exit_code(start):
    assert end(start("report_error(ValueError('key = 3: use 4')); sys.exit(2)")) == (
        2,
        "error: key = 3: use 4\n",
    )


def test_a_rank_that_fails_ends_the_others_and_gives_its_exit_code(start, tmp_path):
    code, errors = end(start("if rank == 0: stay()\nothers_wait()\nsys.exit(7)"))
    assert (code, errors) == (7, "rank 1 failed with exit code 7; the others are stopped\n")
    assert (tmp_path / "stopped0").read_text() == "SIGTERM"


def test_a_rank_that_was_stopped_is_not_said_to_have_failed(start):
    code, errors = end(start("if rank == 0: stay()\nothers_wait()\nsys.exit(128 + signal.SIGTERM)"))
    assert (code, errors) == (143, "rank 1 was stopped by SIGTERM; the others are stopped\n")


def test_a_rank_that_was_killed_gives_128_and_the_signal(start):
    code, errors = end(start("if rank == 0: stay()\nothers_wait()\nos.kill(os.getpid(), signal.SIGKILL)"))
    assert (code, errors) == (137, "rank 1 was killed by SIGKILL (out of memory?); the others are stopped\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_and_their_exit_code_comes_back(start, tmp_path, number):
    # The launcher is asked by a rank, once both can be stopped.
    ask = "if rank == 0: stay()\nothers_wait()\n"
    ask += f"signal.signal({number:d}, lambda *_: sys.exit(128 + {number:d}))\n"
    ask += f"os.kill(os.getppid(), {number:d})\ntime.sleep(60)"
    assert end(start(ask)) == (128 + number, "")
    assert (tmp_path / "stopped0").read_text() == signal.Signals(number).name


def test_a_held_port_can_be_listened_on_by_rank_0():
    from torch.distributed import TCPStore

    held, port = hold_port()
    with held:
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        store.set("key", "value")
        assert TCPStore("127.0.0.1", port, is_master=False).get("key") == b"value"


def test_ranks_that_do_not_meet_are_told_in_one_line(monkeypatch, tmp_path):
    def wait_in_vain(*arguments, **options):
        raise dist.DistStoreError(
            "Timed out after 3 seconds. 1/2 clients joined.\nException raised from here"
        )

    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", wait_in_vain)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "first",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        open_process_group(Comm(init_timeout_seconds=3, trace_buf_size=0), tmp_path)
    told = str(caught.value)
    assert told.startswith(
        "MASTER_ADDR = first, MASTER_PORT = 29500: the 2 ranks of the run did not meet there"
    )
    assert (
        "3 s (comm.init_timeout_seconds): Timed out after 3 seconds. 1/2 clients" in told and "\n" not in told
    )
