"""Every figure of metrics.jsonl as a chart: which group it stands in, and its points on each axis."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from torchtitan.compare.runs import Named, sources_of
from torchtitan.components.run_record import HELD_OUT, PLACES, Axis

AXES: tuple[Axis, ...] = ("steps", "tokens", "hours")
MOST_POINTS = 2000  # of a curve; a longer one is thinned to every n-th
TRAINING, HELD_OUT_GROUP, BY_SOURCE = "Training", "Held out", "By source"
THROUGHPUT, OCCUPANCY, OTHER = "Throughput", "Occupancy", "Other"
GROUPS = (TRAINING, HELD_OUT_GROUP, BY_SOURCE, THROUGHPUT, OCCUPANCY, OTHER)
OF_TRAINING = ("loss", "grad_norm", "lr", "muon_lr")
OF_THROUGHPUT = ("tps", "tflops", "mfu", "memory", "data_wait", "step_s")


def charts(runs: Sequence[Named], occupancy: Collection[str]) -> list[dict[str, Any]]:
    """{"group", "key", "series": [{"run", "steps", "tokens", "hours", "values"}]}, as JSON takes it.

    `occupancy`: figures that say how full a batch is. A figure that is zero in all runs has no chart, nor has
    one that places the others on an axis. What is no number is null.
    """
    sources = {source for run in runs for source in sources_of(run.record)}
    keys = list(dict.fromkeys(key for run in runs for key in run.record.keys))
    axes = {key for key, _ in PLACES.values()}
    found = []
    for key in keys:
        series = [_series(number, run, key) for number, run in enumerate(runs) if key in run.record.keys]
        if key not in axes and any(any(one["values"]) for one in series):
            found.append({"group": group_of(key, sources, occupancy), "key": key, "series": series})
    return sorted(found, key=lambda chart: (GROUPS.index(chart["group"]), _rank(chart["key"])))


def group_of(key: str, sources: Collection[str], occupancy: Collection[str]) -> str:
    """The group of a figure, by its name: `validate/loss`, `images/s`, `tokens/SOURCE`, `lr/GROUP`."""
    first, _, rest = key.partition("/")
    if any(key.endswith(f"/{source}") for source in sources):
        return BY_SOURCE
    if key.startswith(HELD_OUT):
        return HELD_OUT_GROUP
    if key in occupancy:
        return OCCUPANCY
    if rest == "s" or first in OF_THROUGHPUT:
        return THROUGHPUT
    return TRAINING if first in OF_TRAINING else OTHER


def _rank(key: str) -> int:
    """Order in a group: losses, then what is held out, then the rest as it comes."""
    return 0 if key.partition("/")[0] == "loss" else 1 if key.startswith(HELD_OUT) else 2


def _series(number: int, run: Named, key: str) -> dict[str, Any]:
    steps, values = run.record.values(key)
    stride = -(-len(steps) // MOST_POINTS)
    kept = np.unique([*range(0, len(steps), max(1, stride)), len(steps) - 1])
    steps, values = steps[kept], values[kept]
    places = {axis: run.record.on_axis(steps, axis) for axis in AXES}
    shown: dict[str, Any] = {axis: None if at is None else _numbers(at) for axis, at in places.items()}
    return {"run": number, **shown, "values": _numbers(values)}


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.7g}") if np.isfinite(value) else None for value in values]
