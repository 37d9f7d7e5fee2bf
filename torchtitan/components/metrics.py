"""What a run reports: speed, occupancy and loss, as a line on the console and as numbers in the sinks
(sinks.py).

What the trainer measures stands here. What a batch counts of itself is the experiment's (of vlm:
data/batch_metrics.py), and is only added up and shown here.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from torchtitan.components.sinks import open_sinks
from torchtitan.config.job import JobConfig
from torchtitan.tools.hardware import peak_flops, peak_memory_gib
from torchtitan.tools.logging import log_ranks, logger

Values = dict[str, float | None]  # None: not known here, "n/a" on the console

FORMATS: dict[str, Callable[[float], str]] = {
    "loss": "{:.5f}".format,
    "grad_norm": "{:.5f}".format,
    "memory": "{:.2f}GiB".format,
    "tps": "{:,.0f}".format,
    "tflops": "{:.3f}".format,
    "mfu": "{:.2f}%".format,
    "data_wait": "{:.1f}%".format,
    "documents": "{:.0f}".format,
}
COLOURS = {"step": 31, "loss": 32, "grad_norm": 33, "memory": 36, "tps": 34, "tflops": 35, "mfu": 31}


@dataclass(frozen=True)
class Counts:
    """The numbers of a batch (Batch.counts) that the trainer adds up over ranks, by what it makes of each."""

    loss_weight: str  # what a step's summed loss is divided by, over all ranks
    tokens: str  # what tps speaks of
    capacity: Mapping[str, int]  # the most that a slot can hold of some; printed as occupancy
    rates: tuple[str, ...]  # printed per second
    tallies: tuple[str, ...]  # written to the sinks, and not printed
    sources: tuple[str, ...]  # of which a batch gives its epochs (Batch.epochs)

    @property
    def names(self) -> list[str]:
        """All counts that are added up over ranks."""
        return sorted({self.loss_weight, self.tokens, *self.rates, *self.capacity, *self.tallies})


class MetricsMeter:
    """What happened since the last line."""

    def __init__(self, device: torch.device, ranks: int, counts: Counts):
        self.device, self.ranks, self.counts = device, ranks, counts
        self.peak = peak_flops(device)
        self.restart()

    def restart(self) -> None:
        """Begin a new interval: totals and clock at zero."""
        self.totals: dict[str, float] = defaultdict(float)
        self.data_s = 0.0
        self.started = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Validation and checkpoints are no training: throughput speaks of the rest."""
        self.started += seconds

    def add(self, totals: Mapping[str, float], data_s: float) -> None:
        """`totals`: of one step, over all ranks: counts, "slots" and "flops"."""
        for name, value in totals.items():
            self.totals[name] += value
        self.data_s += data_s

    def read(self) -> tuple[Values, Values]:
        """What is printed, and the tallies, which are only written; and begin anew.

        tps, tflops and mfu are per device, and count no padding; occupancy and data_wait are percentages.
        """
        elapsed = time.perf_counter() - self.started
        flops = self.totals["flops"] / elapsed / self.ranks
        values: Values = {
            "memory": peak_memory_gib(self.device),
            "tps": self.totals[self.counts.tokens] / elapsed / self.ranks,
            "tflops": flops / 1e12,
            "mfu": None if self.peak is None else 100 * flops / self.peak,
        }
        slots, capacity = self.totals["slots"], self.counts.capacity
        values |= {name: 100 * self.totals[name] / (size * slots) for name, size in capacity.items()}
        values |= {f"{name}/s": self.totals[name] / elapsed for name in self.counts.rates}
        values["data_wait"] = 100 * self.data_s / elapsed
        tallies: Values = {name: self.totals[name] for name in self.counts.tallies}
        self.restart()
        return values, tallies


def format_line(step: int, values: Values, percentages: tuple[str, ...] = (), colours: bool = False) -> str:
    """`step: 12 loss: 3.14159 ...`; names in `percentages` and not in FORMATS are percentages,
    others rates.
    """
    shown = {"step": str(step)}
    for name, value in values.items():
        default = "{:.1f}%".format if name in percentages else "{:.1f}".format
        shown[name] = "n/a" if value is None else FORMATS.get(name, default)(value)
    parts = [f"{name}: {text}" for name, text in shown.items()]
    if colours:
        parts = [
            f"\033[{COLOURS[n]}m{part}\033[0m" if n in COLOURS else part
            for n, part in zip(shown, parts, strict=True)
        ]
    return " ".join(parts)


class Reporter:
    """Console and sinks of one rank.

    All ranks hold the global numbers; those of LOG_RANK print, the first of them writes.
    """

    def __init__(
        self, job: JobConfig, percentages: tuple[str, ...], first_step: int, rank: int, world_size: int
    ):
        self.writes = rank == min(log_ranks(world_size))
        self.percentages = percentages
        self.colours = sys.stdout.isatty() and not job.metrics.disable_color_printing
        self.sinks = open_sinks(job, first_step) if self.writes else []

    def train(self, step: int, values: Values, unprinted: Values) -> None:
        """A line and a record. `unprinted`: for the sinks alone."""
        self._report("", "", step, values, unprinted)

    def validate(self, step: int, values: Values) -> None:
        """A line and a record, under validate/NAME."""
        self._report("validate ", "validate/", step, values, {})

    def _report(self, word: str, prefix: str, step: int, values: Values, unprinted: Values) -> None:
        logger.info(word + format_line(step, values, self.percentages, self.colours))
        known = {prefix + name: value for name, value in (values | unprinted).items() if value is not None}
        for sink in self.sinks:
            sink.write(step, known)

    def close(self) -> None:
        """Closes the sinks, so that nothing written is lost."""
        for sink in self.sinks:
            sink.close()
