"""A run as its dump folder records it: options of its newest launch, and its figures. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torchtitan.components.saved_config import read_config
from torchtitan.components.sinks import read_history

Axis = Literal["steps", "tokens", "hours"]
LOWER_IS_BETTER = {"loss", "nll", "perplexity", "grad_norm", "step_s", "data_wait", "memory"}
HELD_OUT = "validate/"
HELD_OUT_LOSS = HELD_OUT + "loss"
# Keys of metrics.jsonl that place a record on an axis, and what makes the axis' unit of it.
PLACES: dict[Axis, tuple[str, float]] = {"tokens": ("tokens_seen", 1.0), "hours": ("wall_s", 1 / 3600)}


@dataclass(frozen=True)
class RunRecord:
    """`config`: tables of config.toml, {} where there is none; `history`: records of metrics.jsonl."""

    folder: Path
    config: dict[str, Any]
    history: list[dict[str, float]]

    @cached_property
    def step(self) -> int:
        """The last step with a figure."""
        return int(max((record["step"] for record in self.history), default=0))

    @cached_property
    def keys(self) -> list[str]:
        """Names of all figures, in the order in which they come."""
        return list(dict.fromkeys(key for record in self.history for key in record if key != "step"))

    def values(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a figure, [n] each."""
        points = [(record["step"], record[key]) for record in self.history if key in record]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)

    def on_axis(self, steps: np.ndarray, axis: Axis) -> np.ndarray | None:
        """Where steps lie on an axis; between two records in proportion. None where no record says."""
        if axis == "steps":
            return steps
        key, unit = PLACES[axis]
        known, there = self.values(key)
        if len(known):
            return np.interp(steps, [0.0, *known], [0.0, *(there * unit)])
        a_step = self.tokens_a_step
        return steps * a_step if axis == "tokens" and a_step else None

    @property
    def tokens_a_step(self) -> int:
        """Tokens of a step with full slots; 0 where no configuration says."""
        training = self.config.get("training", {})
        return max(0, training.get("global_batch_size", 0)) * training.get("seq_len", 0)

    def last(self, key: str) -> float | None:
        """The newest value of a figure."""
        _, values = self.values(key)
        return float(values[-1]) if len(values) else None

    def best(self, key: str) -> tuple[float, int] | None:
        """The best value of a figure that is a number, and its step."""
        steps, values = self.values(key)
        known = np.isfinite(values)
        if not known.any():
            return None
        place = values[known].argmin() if lower_is_better(key) else values[known].argmax()
        return float(values[known][place]), int(steps[known][place])


def read_run(folder: Path) -> RunRecord:
    """The record of a dump folder; an empty one where there is nothing."""
    return RunRecord(folder, read_config(folder) or {}, read_history(folder))


def lower_is_better(key: str) -> bool:
    """Whether a figure of this name is better lower: losses, the norm of the gradient, and what a step takes;
    the name of a source, which may come last, says nothing, nor that of a task's file (TASK-FILE).
    """
    names = (name.partition("-")[0] for name in key.split("/")[:2])
    return not LOWER_IS_BETTER.isdisjoint(names)


def is_better(key: str, value: float, than: float) -> bool:
    """Whether a value is better than another; one that is no number never is, and every number beats it."""
    if not math.isfinite(value) or not math.isfinite(than):
        return math.isfinite(value)
    return value < than if lower_is_better(key) else value > than


def place_of_best(key: str, values: Sequence[float | None]) -> int | None:
    """The place of the best of several values of a figure; None where none is a number."""
    best, found = math.nan, None
    for place, value in enumerate(values):
        if value is not None and is_better(key, value, best):
            best, found = value, place
    return found
