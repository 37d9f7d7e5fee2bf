"""A candidate as a short run of the trainer: its job, and its result, from the folder of the run.

What is counted is useful work: FLOPs of tokens, patches and pairs that are no padding, forward and backward,
nothing that is computed again (components/flops.py). Unlike tokens a second, it counts the same work however
slots are filled. Imports no torch.
"""

import re
import statistics
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from torchtitan.components.run_record import RunRecord, read_run
from torchtitan.components.saved_config import changes
from torchtitan.config.errors import require
from torchtitan.config.job import JobConfig, Metrics, Profiling
from torchtitan.config.parse import read_toml
from torchtitan.sweep.members import Member
from torchtitan.sweep.status import JOB, LOG, status_of

WORK, SECONDS, MEMORY = "tflops", "step_s", "memory"  # figures of metrics.jsonl
WARM_UP = 3  # steps that do not count: compiling, first allocations, the eager steps before a CUDA graph
LEAST = 3  # records that count, for a figure
TAIL = 200_000  # characters of a log that say why a run failed
# Texts of torch on a GPU and on a CPU, of C++, of the operating system, and of the launcher.
OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED|std::bad_alloc"
    r"|Cannot allocate memory|MemoryError"
)
KILLED = 128 + 9  # how the kernel ends a process that takes too much memory
State = Literal["measured", "too large", "failed", "cut"]


@dataclass(frozen=True)
class Trial:
    """What became of a candidate."""

    state: State
    why: str = ""  # of one that gave no figure
    work: tuple[float, ...] = ()  # useful TFLOP/s of a device, of each record that counts
    figures: dict[str, float] = field(default_factory=dict)  # medians over those, and the most memory
    seconds: float = 0.0  # of the whole run, its start included

    @cached_property
    def rate(self) -> float | None:
        """Useful TFLOP/s of a device: the median."""
        return statistics.median(self.work) if self.work else None

    @cached_property
    def middle(self) -> tuple[float, float]:
        """The bounds of the middle half of its records."""
        low, _, high = statistics.quantiles(self.work, n=4, method="inclusive")
        return low, high

    def with_another(self, run: "Trial") -> "Trial":
        """Both runs of a candidate together: what is not alike between runs widens the middle half."""
        both = self.figures.keys() & run.figures.keys()
        figures = {name: (self.figures[name] + run.figures[name]) / 2 for name in sorted(both)}
        figures[MEMORY] = max(self.figures[MEMORY], run.figures[MEMORY])
        return Trial("measured", "", self.work + run.work, figures, self.seconds + run.seconds)

    def is_faster(self, than: "Trial") -> bool:
        """Whether it is faster by more than steps differ: its lower quartile above the other's upper."""
        return self.middle[0] > than.middle[1]


def short_run(job: JobConfig, records: int, log_freq: int) -> JobConfig:
    """The job as a candidate runs it: so many records that count, each of `log_freq` steps; nothing is saved,
    validated or drawn, and weights are fresh where the job says its sizes itself.
    """
    job = deepcopy(job)
    job.training.steps = (-(-WARM_UP // log_freq) + records) * log_freq
    job.metrics = Metrics(log_freq=log_freq, save_plot=False)
    job.profiling, job.validation = Profiling(), type(job.validation)()
    loads, job.checkpoint = job.checkpoint, type(job.checkpoint)()
    if not job.model.flavor:  # they say which model it is
        for name, value in vars(loads).items():
            if name.startswith("initial_load"):
                setattr(job.checkpoint, name, value)
    return job


def read_trial(member: Member) -> Trial | None:
    """The result in the folder of a run; None: it was cut, or failed so that it may be tried again."""
    status = status_of(member)
    if status.state == "finished":
        return measured(read_run(member.folder), status.seconds)
    if status.state == "failed" and ran_out_of_memory(member.folder, status.why):
        return Trial("too large", "out of memory", seconds=status.seconds)
    return None


def ended_trial(member: Member) -> Trial:
    """What became of a run that was just started and has ended."""
    status = status_of(member)
    if status.state == "failed" and not ran_out_of_memory(member.folder, status.why):
        return Trial("failed", f"{status.why}; see {member.folder / LOG}", seconds=status.seconds)
    return read_trial(member) or Trial("cut", "the time was over", seconds=status.seconds)


def measured(record: RunRecord, seconds: float) -> Trial:
    """The figures of a run that ended by itself."""
    steps = [0, *(int(entry["step"]) for entry in record.history)]
    counted = [
        entry
        for before, entry in zip(steps, record.history, strict=False)
        if before >= WARM_UP and WORK in entry
    ]
    if len(counted) < LEAST:
        ended = f"it ended at step {record.step}, after {len(counted)} records that count"
        return Trial("failed", f"{ended}, of {LEAST} at least: more data are needed", seconds=seconds)
    names = set.intersection(*(set(entry) for entry in counted))
    figures = {name: statistics.median(entry[name] for entry in counted) for name in sorted(names)}
    figures[MEMORY] = max(entry[MEMORY] for entry in record.history if MEMORY in entry)
    return Trial("measured", "", tuple(entry[WORK] for entry in counted), figures, seconds)


def ran_out_of_memory(folder: Path, why: str) -> bool:
    """Whether a run that failed took more memory than there is."""
    if f"exit code {KILLED}" in why:
        return True
    log = folder / LOG
    text = log.read_text(encoding="utf-8", errors="replace")[-TAIL:] if log.is_file() else ""
    return bool(OUT_OF_MEMORY.search(text)) or "killed by SIGKILL" in text


def require_this_job(member: Member) -> None:
    """Raises ConfigError unless its folder is new, or of this very job."""
    path = member.folder / JOB
    if path.is_file():
        differences = "; ".join(map(str, changes(read_toml(str(path)), member.job)))
        require(not differences, f"{member.folder} is of another job: {differences}; give another --out")
