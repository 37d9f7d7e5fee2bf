"""Starts the ranks of a run on this machine, and ends with the exit code of the first that failed.

    python -m torchtitan.launch --processes 2 experiments --job.config_file job.toml
    python -m torchtitan.launch --processes 8 --machines 4 --machine 0 --address first --port 29500 ...

Ranks get the variables that torchrun would give them. A user's error is printed once, however many ranks have
it. A signal goes on to every rank, each in a session of its own, so that Ctrl-C in a terminal reaches it
once. Imports no torch.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from torchtitan.tools.error_line import ERROR_FILE

POLL_S = 0.05
GRACE_S = 30.0  # from the first failure until the others are killed: they may say whom they waited for
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Place:
    """Which ranks this machine has, and where all of them meet."""

    processes: int
    machines: int
    machine: int
    address: str
    port: int

    def variables(self, local_rank: int) -> dict[str, str]:
        """Environment of a rank, as torchrun sets it."""
        values = {
            "RANK": self.machine * self.processes + local_rank,
            "LOCAL_RANK": local_rank,
            "WORLD_SIZE": self.machines * self.processes,
            "LOCAL_WORLD_SIZE": self.processes,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
        }
        return {name: str(value) for name, value in values.items()}


class Ranks:
    """The processes of this machine."""

    def __init__(self, place: Place, command: Sequence[str], errors: Path):
        self.errors, self.signals = errors, list[int]()
        self.first = place.machine * place.processes
        self.processes: list[subprocess.Popen] = []
        for number in FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._forward)
        for local in range(place.processes):
            self.processes.append(self._start(place.variables(local), command))
        for early in self.signals:  # they came before all of them were there
            self.send(early)

    def _start(self, variables: dict[str, str], command: Sequence[str]) -> subprocess.Popen:
        environment = os.environ | variables | {ERROR_FILE: str(self.errors / variables["RANK"])}
        return subprocess.Popen(command, env=environment, start_new_session=True)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """The first asks to save and stop, the second interrupts; the third ends the ranks at once."""
        self.signals.append(number)
        self.send(number if len(self.signals) <= 2 else signal.SIGKILL)

    def send(self, number: int) -> None:
        """A signal to every rank that runs."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Wait until all have ended. Returns the exit code of the first that failed, or 128 + its signal."""
        failed: int | None = None
        deadline = float("inf")
        while True:
            running = any(process.poll() is None for process in self.processes)
            if failed is None and (failed := self._failed()) is not None:
                self._report(failed)
                self.send(signal.SIGTERM)
                deadline = time.monotonic() + GRACE_S
            if not running:
                return 0 if failed is None else _exit_code(self.processes[failed])
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(POLL_S)

    def _failed(self) -> int | None:
        """A local rank that failed, if any; rather one that knows why than one that lost the others."""
        failed = [local for local, process in enumerate(self.processes) if process.poll()]
        return min(failed, key=lambda local: not self._error(local), default=None)

    def _error(self, local: int) -> str:
        path = self.errors / str(self.first + local)
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def _report(self, local: int) -> None:
        if error := self._error(local):
            print(error, file=sys.stderr, flush=True)
        elif not self.signals:
            end = f"rank {self.first + local} {_how_it_ended(self.processes[local])}"
            print(
                f"{end}{'; the others are stopped' if len(self.processes) > 1 else ''}",
                file=sys.stderr,
                flush=True,
            )


def _exit_code(process: subprocess.Popen) -> int:
    code = process.returncode
    return code if code >= 0 else 128 - code


def _how_it_ended(process: subprocess.Popen) -> str:
    if process.returncode - 128 in FORWARDED:  # it stopped by itself for a signal that it alone received
        return f"was stopped by {signal.Signals(process.returncode - 128).name}"
    if process.returncode >= 0:
        return f"failed with exit code {process.returncode}"
    number = signal.Signals(-process.returncode)
    return f"was killed by {number.name}{' (out of memory?)' if number is signal.SIGKILL else ''}"


def hold_port() -> tuple[socket.socket, int]:
    """A free port, and what keeps it so until rank 0 listens: without a listener it can be bound again."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held, held.getsockname()[1]


def main(argv: Sequence[str]) -> int:
    """The exit code of the first rank that failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m torchtitan.launch", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, required=True, help="ranks on this machine")
    parser.add_argument("--machines", type=int, default=1)
    parser.add_argument("--machine", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--address", default="127.0.0.1", help="of machine 0")
    parser.add_argument("--port", type=int, default=0, help="of machine 0; 0 (one machine alone): a free one")
    parser.add_argument("module", help="what each rank runs, as python -m")
    parser.add_argument("options", nargs=argparse.REMAINDER)
    asked = parser.parse_args(argv)
    held, port = (None, asked.port) if asked.port else hold_port()
    place = Place(asked.processes, asked.machines, asked.machine, asked.address, port)
    with tempfile.TemporaryDirectory(prefix="ranks-") as errors:
        code = Ranks(place, [sys.executable, "-m", asked.module, *asked.options], Path(errors)).wait()
    if held is not None:
        held.close()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
