"""Train the debug model on embedded data, or any job: what run_train.sh and `torchtitan-vlm train` are.

It reads options, and the variables that --help names (experiments/__main__.py). One process is `python -m
experiments`; several are what torchtitan/launch.py starts.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from experiments.__main__ import ready_job
from experiments.commands import sweep
from experiments.commands.job_options import number, with_variables
from torchtitan.config.devices import available_cores, visible_gpus
from torchtitan.config.errors import require
from torchtitan.tools.logging import init_logger

DEFAULT_PORT, LAST_PORT = "29500", 65535


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
        known = machines == 1 or (port.isascii() and port.isdigit() and 0 < int(port) <= LAST_PORT)
        require(known, f"MASTER_PORT = {port}: expected a port, 1 to {LAST_PORT}")
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


def main(argv: Sequence[str]) -> int:
    """Become the trainer, the launcher of several, or a sweep. Raises ConfigError where it starts none."""
    options = with_variables(argv, os.environ)
    if sweep.asks_for_many(options):
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
