"""run_train.sh: what it starts, seen by a stand-in for Python that prints how it was called; and what counts as a whole environment."""

import os
import runpy
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STAND_IN = """#!/bin/sh
case "$*" in
    *missing_packages.py*) exit 0 ;;
    *devices.py*) echo "${FAKE_GPUS:-0}" ;;
    *sched_getaffinity*) echo 8 ;;
    *train=False*) echo "check WORLD_SIZE=$WORLD_SIZE"; exit "${FAKE_CHECK:-0}" ;;
    *) echo "start $*"; echo "LOG_RANK=$LOG_RANK OMP=$OMP_NUM_THREADS WORLD_SIZE=$WORLD_SIZE" ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def start(*options: str, **variables: str) -> subprocess.CompletedProcess:
        ours = ("NGPU", "NNODES", "CONFIG_FILE", "DRY_RUN", "LOG_RANK", "OMP_NUM_THREADS", "WORLD_SIZE", "RANK")
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        environment |= {"VENV": str(tmp_path / "venv")} | variables
        command = [str(REPOSITORY / "run_train.sh"), *options]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    return start


def test_one_process_is_python_itself_with_the_debug_job(launch):
    run = launch("--training.steps", "3")
    assert run.stdout.splitlines() == [
        "start -m experiments --job.config_file train_configs/vlm_debug.toml --training.steps 3",
        "LOG_RANK=0 OMP=7 WORLD_SIZE=",
    ]


def test_a_config_file_among_the_options_comes_after_the_variable(launch):
    line = launch("--job.config_file", "mine.toml", CONFIG_FILE="other.toml").stdout.splitlines()[0]
    assert line == "start -m experiments --job.config_file other.toml --job.config_file mine.toml"


@pytest.mark.parametrize("value", ["1", "true", "True", "yes"])
def test_dry_run_is_an_option_of_the_job(launch, value):
    assert launch(DRY_RUN=value).stdout.splitlines()[0].endswith("--job.dry_run")


@pytest.mark.parametrize("value", ["", "0", "false", "No"])
def test_no_dry_run_where_it_is_switched_off(launch, value):
    run = launch(DRY_RUN=value)
    assert run.returncode == 0 and "dry_run" not in run.stdout


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"DRY_RUN": "maybe"}, "DRY_RUN = maybe: expected true, yes or 1"),
        ({"NGPU": "two"}, "NGPU = two: expected a whole number"),
        ({"NGPU": "-1"}, "NGPU = -1: expected a whole number"),
        ({"NNODES": "0"}, "NNODES = 0: expected a whole number >= 1"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "10.0.0.1"}, "NODE_RANK = 2: must be below NNODES (2)"),
        ({"NNODES": "2"}, "NNODES = 2 needs MASTER_ADDR"),
    ],
)
def test_a_variable_that_cannot_be_is_told_in_one_line_and_nothing_starts(launch, variables, told):
    run = launch(**variables)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith(f"error: {told}") and run.stderr.count("\n") == 1


def test_several_processes_are_checked_once_then_started_on_a_free_port(launch):
    lines = launch(NGPU="2", LOG_RANK="0,1").stdout.splitlines()
    assert lines[0] == "check WORLD_SIZE=2"
    assert lines[1].startswith("start -m torchtitan.launch --processes 2 experiments --job.config_file")
    assert lines[2] == "LOG_RANK=0,1 OMP=3 WORLD_SIZE="


def test_the_visible_gpus_are_the_default_number_of_processes(launch):
    assert "--processes 4" in launch(FAKE_GPUS="4").stdout
    assert "torchtitan.launch" not in launch(FAKE_GPUS="4", NGPU="1").stdout


def test_several_machines_meet_at_the_first(launch):
    lines = launch(NGPU="2", NNODES="3", NODE_RANK="1", MASTER_ADDR="10.0.0.1", MASTER_PORT="1234").stdout.splitlines()
    assert lines[0] == "check WORLD_SIZE=6"
    assert "--processes 2 --machines 3 --machine 1 --address 10.0.0.1 --port 1234 experiments" in lines[1]


def test_nothing_starts_after_a_failed_check(launch):
    run = launch(NGPU="2", FAKE_CHECK="2")
    assert run.returncode == 2 and "start" not in run.stdout


def test_help_is_printed_once_however_many_processes(launch):
    assert launch("--help", NGPU="4").stdout.startswith("start -m experiments")


fault = runpy.run_path(str(REPOSITORY / "scripts" / "missing_packages.py"))["fault"]


@pytest.mark.parametrize(
    ("requirement", "wrong"),
    [
        ("thing>=2.11,<2.14", None),
        ("thing>=2.13.1", ">= 2.13.1"),
        ("thing<2.13", "< 2.13"),
        ("thing", None),
        ("no-such-thing-here", "not installed"),
    ],
)
def test_a_package_counts_only_within_its_bounds(requirement, wrong, monkeypatch):
    real = fault.__globals__["metadata"]
    monkeypatch.setattr(real, "version", lambda name: "2.13.0+cpu" if name == "thing" else missing(real))
    told = fault(requirement)
    assert told is None if wrong is None else wrong in told


def missing(metadata):
    raise metadata.PackageNotFoundError
