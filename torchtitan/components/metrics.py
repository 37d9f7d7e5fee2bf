"""What a run reports: speed, occupancy, loss, as a line on the console and numbers in the sinks.

What the trainer measures stands here. What a batch counts of itself is the experiment's (of vlm:
data/batch_metrics.py), and is only added up and shown here.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from torchtitan.components.sinks import Exhibit, History, charted, open_sinks, read_history
from torchtitan.config.job import JobConfig
from torchtitan.distributed.collectives import sum_over_ranks
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
    tokens: str  # what tps counts
    capacity: Mapping[str, int]  # the most that a slot can hold of some; printed as occupancy
    rates: tuple[str, ...]  # printed per second
    tallies: tuple[str, ...]  # written to the sinks, and not printed
    # sources of training: a batch has their epochs (Batch.epochs) and `loss_weight/SOURCE`, the loss their
    # parts
    sources: tuple[str, ...]
    held_out: tuple[str, ...]  # sources of validation
    passes: Mapping[str, int] = field(default_factory=dict)  # source -> after how many epochs it ends

    @property
    def names(self) -> list[str]:
        """All counts that are added up over ranks."""
        return sorted({self.loss_weight, self.tokens, *self.rates, *self.capacity, *self.tallies})


class MetricsMeter:
    """Adds up what happened since the last line."""

    def __init__(self, device: torch.device, ranks: int, counts: Counts):
        self.device, self.ranks, self.counts = device, ranks, counts
        self.peak = peak_flops(device)
        self.restart()

    def restart(self) -> None:
        """Begin a new interval: totals and clock at zero."""
        self.totals: dict[str, float] = defaultdict(float)
        self.steps, self.data_s = 0, 0.0
        self.started = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Leave out the time of validation and checkpoints: throughput is that of training."""
        self.started += seconds

    def add(self, totals: Mapping[str, float], data_s: float) -> None:
        """Add one step. `totals`: over all ranks, its counts, "slots" and "flops"."""
        for name, value in totals.items():
            self.totals[name] += value
        self.steps += 1
        self.data_s += data_s

    def read(self) -> tuple[Values, Values]:
        """Returns what is printed, and the tallies, which are only written; begins a new interval.

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
        tallies["step_s"] = elapsed / max(1, self.steps)
        self.restart()
        return values, tallies


class SourceLosses:
    """The summed loss of each source's tokens since the last line; on the device until it is read."""

    def __init__(self, device: torch.device, counts: Counts):
        self.sources, self.weight = counts.sources, counts.loss_weight
        self.sums_G = torch.zeros(len(self.sources), device=device)

    def add(self, losses_G: Tensor) -> None:
        """Add this rank's losses of one step."""
        self.sums_G += losses_G

    def read(self, tallies: Values, copies: int) -> Values:
        """Nats a token of each source that had any, over all ranks, where `copies` ranks each hold the same;
        begins anew. `tallies`: of the same steps.
        """
        sums = (sum_over_ranks(self.sums_G) / copies).tolist()
        self.sums_G.zero_()
        tokens = [tallies[f"{self.weight}/{source}"] for source in self.sources]
        of_each = zip(self.sources, sums, tokens, strict=True)
        return {f"loss/{source}": total / count for source, total, count in of_each if count}


def format_line(
    step: int,
    values: Values,
    percentages: Sequence[str] = (),
    colours: bool = False,
    other: str = "{:.1f}",
) -> str:
    """`step: 12 loss: 3.14159 ...`; names in `percentages` and not in FORMATS are percentages,
    those that are neither are written as `other` says.
    """
    shown = {"step": str(step)}
    for name, value in values.items():
        default = "{:.1f}%".format if name in percentages else other.format
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

    All ranks hold the global numbers; those of LOG_RANK print, the first of them writes. A number is written
    once it has been other than zero, so that no chart has only zeros; but the history has the zeros of
    held-out figures, which are results.
    """

    def __init__(
        self,
        job: JobConfig,
        occupancy: Sequence[str],
        shares: Sequence[str],
        first_step: int,
        rank: int,
        world_size: int,
    ):
        """Percentages are `occupancy` in the lines of training, and `shares` in those of validation."""
        self.writes = rank == min(log_ranks(world_size))
        self.occupancy, self.shares = occupancy, shares
        self.colours = sys.stdout.isatty() and not job.metrics.disable_color_printing
        self.sinks = open_sinks(job, first_step) if self.writes else []
        history = read_history(Path(job.job.dump_folder)) if self.writes else []
        self.charts = charted(history)

    def train(self, step: int, values: Values, unprinted: Values) -> None:
        """A line and a record. `unprinted`: for the sinks alone."""
        logger.info(format_line(step, values, self.occupancy, self.colours))
        self.keep("", step, values | unprinted)

    def validate(self, step: int, values: Values) -> None:
        """A record, under validate/NAME; a line, and one for each of several sources (NAME/SOURCE)."""
        of_source: dict[str, Values] = defaultdict(dict)  # "": of all
        for key, value in values.items():
            name, _, source = key.partition("/")
            of_source[source][name] = value
        for source, own in of_source.items():
            if not source or len(of_source) > 2:
                line = format_line(step, own, self.shares, self.colours, "{:.0f}")
                logger.info(f"validate {source} {line}" if source else f"validate {line}")
        self.keep("validate/", step, values)

    def tasks(self, step: int, values: Values, exhibits: Sequence[Exhibit]) -> None:
        """A line and a record, under validate/TASK/METRIC, and exhibits, under validate/ too."""
        logger.info("tasks " + format_line(step, values, (), self.colours, "{:.4g}"))
        self.charts |= {f"validate/{name}" for name in values}  # here zero is a result
        self.keep("validate/", step, values)
        for sink in self.sinks:
            sink.show(step, [replace(exhibit, name=f"validate/{exhibit.name}") for exhibit in exhibits])

    def keep(self, prefix: str, step: int, values: Values) -> None:
        """A record in every sink, each name after `prefix`, and no line."""
        known = {prefix + name: value for name, value in values.items() if value is not None}
        self.charts |= charted([known])
        shown = {name: value for name, value in known.items() if name in self.charts}
        for sink in self.sinks:
            sink.write(step, known if prefix and isinstance(sink, History) else shown)

    def close(self) -> None:
        """Closes the sinks, so that nothing written is lost."""
        for sink in self.sinks:
            sink.close()
