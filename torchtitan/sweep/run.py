"""Starts the runs of a sweep, as many at a time as there are places, and waits for them.

Each trainer is a process in a session of its own, so that Ctrl-C in a terminal reaches it once, through here.
Where the sweep itself is killed, they get SIGTERM from the kernel, save and stop. Imports no torch.
"""

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torchtitan
from torchtitan.components.sinks import read_history
from torchtitan.sweep.members import Member
from torchtitan.sweep.places import Place
from torchtitan.sweep.status import JOB, LOCK, LOG, begin, ended, read_record, write_record
from torchtitan.tools.lock import take_lock
from torchtitan.tools.logging import logger
from torchtitan.tools.signals import handled

POLL_S = 0.05
REPORT_S = 60.0  # between two lines about the runs that go on
# What runs get when the time is over, and how long after that: they are asked to stop, then interrupted.
ENDING = ((0.0, signal.SIGTERM), (15.0, signal.SIGINT))
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Variables of the sweep's own environment that would make a run another one.
NOT_FOR_RUNS = ("CONFIG_FILE", "DRY_RUN", "WANDB_NAME", "WANDB_RUN_ID")
SET_PARENT_DEATH_SIGNAL = 1  # of prctl, Linux


@dataclass
class Running:
    """A run that goes on."""

    member: Member
    place: Place
    process: subprocess.Popen
    lock: int
    started: float


class Sweeper:
    """The runs `wanted`, in `places`. `command`: a job file -> what trains it; `group`: of wandb.

    `deadline`: on the clock of time.monotonic, when what still runs is stopped, as SIGTERM would.
    """

    def __init__(
        self,
        wanted: Sequence[Member],
        places: Sequence[Place],
        command: Callable[[Path], list[str]],
        group: str,
        deadline: float = math.inf,
    ):
        self.waiting, self.free = list(wanted), list(places)
        self.command, self.group, self.deadline = command, group, deadline
        self.running: list[Running] = []
        self.left_to_others: set[str] = set()  # reported once
        self.signals: list[int] = []

    def run(self) -> signal.Signals | None:
        """Run all until they have ended. Returns the signal that stopped them, if one did."""
        reported = time.monotonic()
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        with handled([n for n in FORWARDED if not (nohup and n == signal.SIGHUP)], self._forward):
            while self.running or (self.waiting and not self.signals):
                self._reap()
                self._fill()
                self._end_in_time()
                if time.monotonic() - reported > REPORT_S:
                    reported = time.monotonic()
                    self._report()
                time.sleep(POLL_S)
        return signal.Signals(self.signals[0]) if self.signals else None

    def _end_in_time(self) -> None:
        if len(self.signals) < len(ENDING):
            after_s, number = ENDING[len(self.signals)]
            if time.monotonic() > self.deadline + after_s:
                self._forward(number)

    def _forward(self, number: int, frame: FrameType | None = None) -> None:
        """Pass a signal on: the first asks to save and stop, the second interrupts, the third kills."""
        self.signals.append(number)
        for one in self.running:
            if one.process.poll() is None:
                one.process.send_signal(_asked(number) if len(self.signals) <= 2 else signal.SIGKILL)

    def _fill(self) -> None:
        """Start runs in the free places. One that another process has in hand is left to it for now."""
        for member in list(self.waiting):
            if not self.free or self.signals:
                return
            if (lock := take_lock(member.folder / LOCK)) is None:
                if member.name not in self.left_to_others:
                    self.left_to_others.add(member.name)
                    logger.info(f"{member.name}: another process runs it")
                continue
            self.waiting.remove(member)
            if (status := ended(member)).state == "finished":
                logger.info(f"{member.name}: {status}")
                os.close(lock)
            else:
                logger.info(f"{member.name}: starts ({status})")
                self._start(member, lock)

    def _start(self, member: Member, lock: int) -> None:
        place = self.free.pop(0)
        begin(member)
        with (member.folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                self.command(member.folder / JOB),
                env=self._variables(member, place),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock],
                preexec_fn=_end_with_parent,
            )
        self.running.append(Running(member, place, process, lock, time.monotonic()))
        for early in self.signals:  # they came while it was started
            process.send_signal(_asked(early))

    def _variables(self, member: Member, place: Place) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if name not in NOT_FOR_RUNS}
        # Runs find this code from whatever folder the sweep was started in.
        source = str(Path(torchtitan.__file__).parents[1])
        path = f"{source}{os.pathsep}{own['PYTHONPATH']}" if own.get("PYTHONPATH") else source
        group = own.get("WANDB_RUN_GROUP") or self.group
        names = {"PYTHONPATH": path, "WANDB_RUN_GROUP": group, "WANDB_NAME": member.name}
        return own | names | place

    def _reap(self) -> None:
        for one in [one for one in self.running if one.process.poll() is not None]:
            code = one.process.returncode
            before = read_record(one.member.folder).get("seconds", 0.0)
            seconds = time.monotonic() - one.started
            write_record(one.member.folder, code if code >= 0 else 128 - code, before + seconds)
            os.close(one.lock)
            self.running.remove(one)
            self.free.insert(0, one.place)
            logger.info(f"{one.member.name}: {ended(one.member)}; {seconds:.0f} s{_newest(one.member)}")

    def _report(self) -> None:
        for one in self.running:
            logger.info(f"{one.member.name}: running{_newest(one.member)}")
        if self.waiting:
            logger.info(f"{len(self.waiting)} more to run")


def _newest(member: Member) -> str:
    """The last record of its metrics, as a line."""
    history = read_history(member.folder)
    if not history:
        return ""
    losses = [record["loss"] for record in history if "loss" in record]
    loss = f", loss {losses[-1]:.4f}" if losses else ""
    return f"; step {history[-1]['step']} of {member.job.training.steps}{loss}"


def _asked(number: int) -> int:
    """The signal for a trainer, which saves on SIGTERM and SIGINT alone."""
    return signal.SIGTERM if number == signal.SIGHUP else number


def _end_with_parent() -> None:
    """In the child: ask for SIGTERM when the sweep is gone, however it ended. Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
