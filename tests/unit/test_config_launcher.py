"""`torchtitan-vlm train`: what process it becomes; and that run_train.sh is this command."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.commands import estimate_memory, main, train

REPOSITORY = Path(__file__).parents[2]
OURS = (
    *("NGPU", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CONFIG_FILE", "DRY_RUN", "LOG_RANK"),
    *("OMP_NUM_THREADS", "WORLD_SIZE", "RANK", "LOCAL_RANK"),
)
JOB = ["--job.config_file", "train_configs/vlm_debug.toml"]


class Became(Exception):
    """Stands for the end of this process, which another takes over."""


@pytest.fixture
def launch(monkeypatch):
    """What the process becomes (without its interpreter), on 8 cores; None where it ends with an error."""

    def become(interpreter: str, command: list[str]) -> None:
        assert interpreter == command[0] == sys.executable
        raise Became(*command[1:])

    def start(*options: str, gpus: int = 0, **variables: str) -> list[str] | None:
        monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in OURS} | variables)
        monkeypatch.setattr(os, "execv", become)
        monkeypatch.setattr(train, "available_cores", lambda: 8)
        monkeypatch.setattr(train, "visible_gpus", lambda: gpus)
        try:
            assert main(["train", *options]) == 2
        except Became as command:
            return list(command.args)
        return None

    return start


def test_one_process_is_python_itself_with_the_debug_job(launch):
    command = launch("--training.steps", "3", RANK="1", WORLD_SIZE="2")
    assert command == ["-m", "experiments", *JOB, "--training.steps", "3"]
    assert (os.environ["LOG_RANK"], os.environ["OMP_NUM_THREADS"]) == ("0", "7")
    assert "RANK" not in os.environ and "WORLD_SIZE" not in os.environ


def test_a_config_file_among_the_options_comes_after_the_variable(launch):
    command = launch("--job.config_file", "mine.toml", CONFIG_FILE="other.toml")
    assert command == [
        "-m",
        "experiments",
        "--job.config_file",
        "other.toml",
        "--job.config_file",
        "mine.toml",
    ]


@pytest.mark.parametrize("value", ["1", "true", "True", "yes"])
def test_dry_run_is_an_option_of_the_job(launch, value):
    assert launch(DRY_RUN=value)[-1] == "--job.dry_run"


@pytest.mark.parametrize("value", ["", "0", "false", "No"])
def test_no_dry_run_where_it_is_switched_off(launch, value):
    assert launch(DRY_RUN=value) == ["-m", "experiments", *JOB]


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"DRY_RUN": "maybe"}, "DRY_RUN = maybe: expected true, yes or 1"),
        ({"NGPU": "two"}, "NGPU = two: expected a whole number"),
        ({"NGPU": "-1"}, "NGPU = -1: expected a whole number"),
        ({"NNODES": "0"}, "NNODES = 0: expected a whole number >= 1"),
        (
            {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "10.0.0.1"},
            "NODE_RANK = 2: must be below NNODES (2)",
        ),
        ({"NNODES": "2"}, "NNODES = 2 needs MASTER_ADDR"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "MASTER_PORT": "http"}, "MASTER_PORT = http: expected a port"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}, "MASTER_PORT = 99999: expected a port"),
    ],
)
def test_a_variable_that_cannot_be_is_told_in_one_line_and_nothing_starts(launch, capsys, variables, told):
    assert launch(**variables) is None
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {told}") and err.count("\n") == 1


def test_several_processes_are_checked_once_then_started_on_a_free_port(launch, monkeypatch):
    checked = []
    monkeypatch.setattr(train, "ready_job", lambda options, world_size: checked.append((options, world_size)))
    command = launch(NGPU="2", LOG_RANK="0,1")
    assert checked == [(JOB, 2)]
    assert command == ["-m", "torchtitan.launch", "--processes", "2", "experiments", *JOB]
    assert (os.environ["LOG_RANK"], os.environ["OMP_NUM_THREADS"]) == ("0,1", "3")
    assert "WORLD_SIZE" not in os.environ


def test_the_visible_gpus_are_the_default_number_of_processes(launch):
    assert launch(gpus=4)[2:4] == ["--processes", "4"]
    assert launch(gpus=4, NGPU="1")[1] == "experiments"


def test_several_machines_meet_at_the_first(launch, monkeypatch):
    checked = []
    monkeypatch.setattr(train, "ready_job", lambda options, world_size: checked.append(world_size))
    command = launch(NGPU="2", NNODES="3", NODE_RANK="1", MASTER_ADDR="10.0.0.1", MASTER_PORT="1234")
    assert checked == [6]
    assert " ".join(command).startswith(
        "-m torchtitan.launch --processes 2 --machines 3 --machine 1 --address 10.0.0.1 --port 1234 "
    )


def test_nothing_starts_after_a_failed_check(launch, capsys):
    assert launch("--training.steps", "0", NGPU="2") is None
    assert capsys.readouterr().err == "error: training.steps = 0: must be >= 1\n"


def test_help_is_printed_once_however_many_processes(launch):
    assert launch("--help", NGPU="4")[1] == "experiments"


def test_the_usage_of_a_command_names_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/venv/bin/torchtitan-vlm", "inspect", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.startswith("usage: torchtitan-vlm inspect [-h]")


def test_a_command_that_is_asked_to_end_closes_what_it_opened(monkeypatch):
    closed, before = [], signal.getsignal(signal.SIGTERM)

    def wait(options: list[str]) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
            return 0
        finally:
            closed.append(True)

    monkeypatch.setattr(estimate_memory, "main", wait)
    with pytest.raises(SystemExit) as ended:
        main(["estimate"])
    assert ended.value.code == 143 and closed == [True]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_full_disk_is_told_in_one_line_whatever_the_command(monkeypatch, capsys, tmp_path):
    def fill(options: list[str]) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *options)

    monkeypatch.setattr(estimate_memory, "main", fill)
    assert main(["estimate"]) == main(["estimate", str(tmp_path / "a")]) == 2
    nameless, named = capsys.readouterr().err.splitlines()
    assert nameless == "error: a file was not written (No space left on device): make room"
    assert named.startswith(f"error: {tmp_path}/a was not written (No space left on device; ")


def test_an_unknown_command_names_the_closest(capsys):
    assert main(["insect"]) == 2
    assert capsys.readouterr().err == "error: insect: no such command; did you mean inspect?\n"


def test_the_shell_script_is_the_command_in_its_environment(tmp_path):
    """Seen by a stand-in for Python that prints how it was called."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\ncase "$*" in *packages.py*) exit 0 ;; esac\necho "$PWD: $*"\n')
    python.chmod(0o755)
    command = [str(REPOSITORY / "run_train.sh"), "--training.steps", "3"]
    environment = os.environ | {"VENV": str(tmp_path / "venv")}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout == f"{REPOSITORY}: -m experiments.commands train --training.steps 3\n"
