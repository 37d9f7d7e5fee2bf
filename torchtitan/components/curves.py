"""curves.png: loss, held-out figures and occupancy over the steps, from metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path

from torchtitan.components.sinks import read_history

CURVES = "curves.png"
Series = tuple[str, str]  # key in the history, label


def draw_curves(folder: Path, occupancy: Sequence[str], groups: Sequence[str]) -> Path:
    """Three panels under one step axis. Returns the picture's path."""
    import matplotlib  # 0.5 s, and only a run's end needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    history = read_history(folder)
    shares = [("validate/exact", "exact"), *((f"validate/{name}", name) for name in groups)]
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    _plot(panels[0], history, [("loss", "training"), ("validate/loss", "held out")], "loss, nats a token")
    _plot(panels[1], history, shares, "held-out documents exact, %")
    _plot(panels[2], history, [(name, name) for name in occupancy], "occupancy, %")
    panels[1].set_ylim(0, 100)
    path = folder / CURVES
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _plot(panel, history: list[dict[str, float]], series: Sequence[Series], title: str) -> None:
    panel.set_title(title)
    panel.set_xlabel("step")
    panel.grid(alpha=0.3)
    for key, label in series:
        points = [(record["step"], record[key]) for record in history if key in record]
        if points:
            sparse = len(points) < 50
            panel.plot(*zip(*points, strict=True), label=label, marker="o" if sparse else None, markersize=3)
    if panel.lines:
        panel.legend()
