"""Train the debug model on embedded data, or any job: what run_train.sh and `torchtitan-vlm train` are.

The variables that it reads, beside the options, are those that --help names (experiments/__main__.py). One
process is `python -m experiments`; several are what torchtitan/launch.py starts.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from experiments.__main__ import ready_job
from torchtitan.config.devices import available_cores, visible_gpus
from torchtitan.config.errors import ConfigError, require
from torchtitan.config.parse import SWEEP, split_options, table_of
from torchtitan.tools.logging import init_logger

DEFAULT_JOB = "train_configs/vlm_debug.toml"
DEFAULT_PORT = "29500"
MANY, HELP = ("--sweep", "--zip", "--random", "--seeds"), ["--help", SWEEP]  # what only a sweep is asked for
ON, OFF = ("1", "true", "yes"), ("", "0", "false", "no")


@dataclass(frozen=True)
class Machines:
    """How many processes there are, and which of the machines this is."""

    processes: int  # on this machine
    machines: int
    machine: int
    address: str
    port: str

    @classmethod
    def of(cls, variables: Mapping[str, str], gpus: Callable[[], int]) -> "Machines":
        """Raises ConfigError for a variable that cannot be."""
        processes, machines = (number(variables, name, least) for name, least in (("NGPU", 0), ("NNODES", 1)))
        machine, address = number(variables, "NODE_RANK", 0), variables.get("MASTER_ADDR", "")
        too_large = f"NODE_RANK = {machine}: must be below NNODES ({machines}), since it counts from 0"
        require(machine < machines, too_large)
        nowhere = f"NNODES = {machines} needs MASTER_ADDR, the address of the first machine"
        require(machines == 1 or bool(address), nowhere)
        port = variables.get("MASTER_PORT") or DEFAULT_PORT
        return cls(processes or gpus() or 1, machines, machine, address, port)

    @property
    def world_size(self) -> int:
        """Ranks of the run, on all machines together."""
        return self.processes * self.machines

    def launcher(self) -> list[str]:
        """Module and options that start the processes of this machine."""
        command = ["torchtitan.launch", "--processes", str(self.processes)]
        if self.machines > 1:
            command += ["--machines", str(self.machines), "--machine", str(self.machine)]
            command += ["--address", self.address, "--port", self.port]
        return command


def job_options(argv: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """What the variables ask of the job, and `argv`, which wins. Raises ConfigError."""
    dry_run = variables.get("DRY_RUN", "")
    known = dry_run.lower() in ON + OFF
    require(known, f"DRY_RUN = {dry_run}: expected true, yes or 1, or else false, no or 0")
    options = ["--job.config_file", variables.get("CONFIG_FILE") or DEFAULT_JOB, *argv]
    return [*options, "--job.dry_run"] if dry_run.lower() in ON else options


def asks_for_many(options: Sequence[str]) -> bool:
    """Whether these are the options of a sweep: of the command, or a file with a table [sweep]."""
    groups = split_options(options)
    with contextlib.suppress(ConfigError):  # the trainer says what is wrong with the file
        return any(group[0] in MANY for group in groups) or HELP in groups or SWEEP in table_of(options)
    return False


def main(argv: Sequence[str]) -> int:
    """Become the trainer, the launcher of several, or a sweep. Raises ConfigError where it starts none."""
    options = job_options(argv, os.environ)
    if asks_for_many(options):
        from experiments.commands import sweep

        return sweep.main(argv)
    machines = Machines.of(os.environ, visible_gpus)
    for left_over in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(left_over, None)
    os.environ["LOG_RANK"] = os.environ.get("LOG_RANK") or "0"
    # One core is left to the loader: threads of a trainer that share it wait for each other, spinning (2 to 8
    # times slower).
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(
        max(1, available_cores() // machines.processes - 1)
    )
    if machines.world_size == 1 or "--help" in argv or "-h" in argv:
        _become(["experiments", *options])  # signals reach the trainer itself
    # One check before many processes start: its error comes once and at once.
    init_logger()
    ready_job(options, machines.world_size)
    _become([*machines.launcher(), "experiments", *options])


def _become(module: Sequence[str]) -> NoReturn:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", *module])


def number(variables: Mapping[str, str], name: str, least: int) -> int:
    """The whole number that a variable holds; `least` where it is not set. Raises ConfigError."""
    value = variables.get(name) or str(least)
    plain = value.isascii() and value.isdigit() and (value == "0" or value[0] != "0")
    require(plain and int(value) >= least, f"{name} = {value}: expected a whole number >= {least}")
    return int(value)
