"""curves.png: the figures of a run's metrics.jsonl over its steps. What was not measured has no panel."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchtitan.components.run_record import HELD_OUT, RunRecord, read_run
from torchtitan.components.sinks import charted

CURVES = "curves.png"
COLUMNS = (3, 4)
DECADES = 4  # of a logarithmic axis: what is lower is cut off, as the last steps of a decay are
WIDTH, HEIGHT = 4.6, 3.4  # inches of a panel
ALSO_HELD_OUT = ", held out"


@dataclass(frozen=True)
class Panel:
    """One chart. `series`: name in the history -> label; those under validate/ are dashed."""

    title: str
    series: Mapping[str, str]
    log: bool = False
    percent: bool = False


def draw_curves(folder: Path, occupancy: Sequence[str], groups: Sequence[str]) -> Path:
    """All panels of `panels_of` that have something to show. Returns the picture's path."""
    import matplotlib  # 0.5 s, and only a run's end needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    run = read_run(folder)
    shown = charted(run.history)
    known = [key for key in run.keys if key in shown]
    panels = [panel for panel in panels_of(known, occupancy, groups) if panel.series]
    rows, columns = _grid(max(1, len(panels)))
    size = WIDTH * columns, HEIGHT * rows
    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw(axis, panel, run)
    path = folder / CURVES
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def panels_of(known: Sequence[str], occupancy: Sequence[str], groups: Sequence[str]) -> list[Panel]:
    """All panels, each with those of its series that are known figures; a panel without any is empty."""

    def there(series: Mapping[str, str]) -> dict[str, str]:
        return {name: label for name, label in series.items() if name in known}

    def sources(prefix: str, end: str = "") -> dict[str, str]:
        """A series for each source, where there are several."""
        found = {name: name.removeprefix(prefix) + end for name in known if name.startswith(prefix)}
        return found if len(found) > 1 else {}

    rates = {name: name for name in known if name.split("/")[0] in ("lr", "muon_lr")}
    exact = {"validate/exact": "all", **{f"validate/{group}": group for group in groups}}
    held_out = sources("validate/loss/", ALSO_HELD_OUT)
    return [
        Panel("loss, nats a token", there({"loss": "training", "validate/loss": "held out"}), log=True),
        Panel("loss by source", sources("loss/") | held_out, log=True),
        Panel("held-out tokens right, %", there({"validate/right": "all"}) | sources("validate/right/")),
        Panel("held-out documents exact, %", there(exact) | sources("validate/exact/"), percent=True),
        Panel("learning rate", rates, log=len(rates) > 1),
        Panel("gradient norm, before clipping", there({"grad_norm": "gradient norm"}), log=True),
        Panel("tokens a second, of one device", there({"tps": "tokens"})),
        Panel("occupancy of slots, %", there({name: name for name in occupancy})),
        Panel("epochs of each source", {n: n.removeprefix("epochs/") for n in known if "epochs/" in n}),
    ]


def _grid(panels: int) -> tuple[int, int]:
    """Rows and columns that leave the fewest places free."""
    columns = min(COLUMNS, key=lambda columns: (-panels % columns, -columns))
    return math.ceil(panels / columns), columns


def _draw(axis, panel: Panel, run: RunRecord) -> None:
    axis.set_title(panel.title)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    colours: dict[str, str] = {}  # a source has one, held out too
    for name, label in panel.series.items():
        steps, values = run.values(name)
        axis.plot(
            steps,
            values,
            label=label.replace("$", r"\$"),  # else matplotlib reads mathematics
            color=colours.setdefault(label.removesuffix(ALSO_HELD_OUT), f"C{len(colours)}"),
            linestyle="--" if name.startswith(HELD_OUT) else "-",
            marker="o" if len(steps) < 50 else None,
            markersize=3,
        )
    if panel.log:
        _make_logarithmic(axis)
    if panel.percent:
        axis.set_ylim(0, 100)
    if len(panel.series) > 1:
        axis.legend(fontsize="small")


def _make_logarithmic(axis) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    low = max(low, high / 10**DECADES)
    axis.set_ylim(low, high)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
