"""How often each source of data was delivered, by all ranks together, and a line when it begins anew or ends.

One epoch is over when as much as the source holds was delivered; some of it may then have come twice and some
not at all, since slots go on by themselves.
"""

import math
from collections.abc import Mapping, Sequence

from torchtitan.tools.logging import logger

ROUNDING = 1e-6  # shares are added up in floating point


class Epochs:
    """How often each source was delivered, and what of that is not logged yet."""

    def __init__(self, sources: Sequence[str], resumed: bool, passes: Mapping[str, int]):
        """`resumed`: which epoch each source is in, and whether it has ended, shows with the first step.
        `passes`: source -> after how many epochs it ends, where it does.
        """
        self.values = dict.fromkeys(sources, 0.0)
        self.resumed, self.passes = resumed, passes
        self.ended: dict[str, int | None] = {}  # source -> the step it ended in; None: needs no line
        # the latest epoch of each source that needs no line
        self.logged = {} if resumed else dict.fromkeys(sources, 1)
        # source -> (an epoch not logged yet, the step it began in)
        self.began: dict[str, tuple[int, int]] = {}

    @property
    def names(self) -> dict[str, str]:
        """Source -> the name that its epochs bear among a step's counts, and in the metrics."""
        return {source: f"epochs/{source}" for source in self.values}

    def add(self, step: int, total: Mapping[str, float]) -> None:
        """`total`: of a step, over all ranks."""
        self.values = {source: total[name] for source, name in self.names.items()}
        for source, value in self.values.items():
            present = max(1, math.ceil(value - ROUNDING))
            if present > max(self.logged.setdefault(source, present), self.began.get(source, (0, 0))[0]):
                self.began[source] = present, step
            if value > self.passes.get(source, math.inf) - ROUNDING:
                self.ended.setdefault(source, None if self.resumed else step)
        self.resumed = False

    def log(self) -> None:
        """A line for each source that began anew, however often, or ended since the last call."""
        for source, (epoch, step) in self.began.items():
            logger.info(f"source {source}: epoch {epoch} began in step {step}")
            self.logged[source] = epoch
        for source, last in self.ended.items():
            if last is not None:
                logger.info(f"source {source}: epoch {self.passes[source]}, its last, ended in step {last}")
        self.began, self.ended = {}, dict.fromkeys(self.ended)

    def metrics(self) -> dict[str, float]:
        """The value of each source under its name in the metrics."""
        return {name: self.values[source] for source, name in self.names.items()}
