"""sweep.png: one panel for what is swept together, runs named by what tells them apart, all text readable."""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import FigureBase
from matplotlib.text import Text

from torchtitan.components.run_record import RunRecord
from torchtitan.sweep.members import Member, names
from torchtitan.sweep.panels import BEST, draw_panel, lines_of
from torchtitan.sweep.picture import draw
from torchtitan.sweep.results import Result, Results, table
from torchtitan.sweep.space import Range, Space, combinations
from torchtitan.sweep.status import Status

TYPES = {"optimizer.lr": float, "optimizer.name": str, "training.seq_len": int, "data.patches_per_row": int}
TYPES |= {"data.resize": str, "debug.seed": int, "model.tokenizer_path": str}
RATES = {"optimizer.lr": [5e-4, 4e-3, 3e-2]}
PLANS = {
    "data.resize": ["native", "square", "padded", "tiles"],
    "data.patches_per_row": [768, 1080, 1080, 1792],
    "training.seq_len": [512, 592, 592, 792],
}
PATHS = [f"/datasets/{'a-long-folder/' * 4}tokenizer-{letter}" for letter in (*"abcde", "$_$")]
NOTHING = Space({}, [], {}, 0, 0, 0)
SWEEPS = {
    "a grid": replace(NOTHING, grid={"optimizer.name": ["AdamW", "Muon"]} | RATES),
    "values that go together": replace(NOTHING, zipped=[PLANS]),
    "both": replace(NOTHING, grid=RATES, zipped=[PLANS]),
    "draws": replace(NOTHING, random={"optimizer.lr": Range(1e-5, 1e-2, "log"),
                                      "training.seq_len": Range(256, 1024)}, draws=12),
    "few draws": replace(NOTHING, random={"optimizer.lr": Range(1e-5, 1e-2, "log"),
                                          "training.seq_len": Range(256, 1024)}, draws=5),
    "an option with seeds": replace(NOTHING, grid=RATES, seeds=3),
    "seeds alone": replace(NOTHING, seeds=4),
    "long paths": replace(NOTHING, grid={"model.tokenizer_path": PATHS}),
    "many values": replace(NOTHING, grid={"training.seq_len": list(range(256, 256 + 40 * 16, 16))}),
    "one value": replace(NOTHING, grid={"optimizer.lr": [1e-3]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def sketch(tmp_path_factory) -> Iterator:
    """A sweep -> its picture, as matplotlib holds it. Run n ends with a loss of 1 + n."""
    folder, close, figures = tmp_path_factory.mktemp("sweep"), pyplot.close, []

    @functools.cache
    def make(name: str, metric: str = "validate/loss"):
        draw(results_of(SWEEPS[name], metric), folder)
        return figures[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "close", figures.append)
        yield make
    for figure in figures:
        close(figure)


def results_of(space: Space, metric: str) -> Results:
    settings = combinations(space, TYPES, first_seed=7)
    runs = []
    for index, (each, name) in enumerate(zip(settings, names(settings), strict=True)):
        values = [(step, 1 + index + 7 / step - 1) for step in range(1, 8)]
        history = [{"step": step, "loss": y, metric: y, "tokens_seen": 150_000 * step} for step, y in values]
        member = Member(index, name, each, SimpleNamespace())
        runs.append(Result(member, Status("finished"), RunRecord(Path(name), {}, history)))
    return Results(runs, space.axes, metric)


def texts(figure: FigureBase) -> list[Text]:
    """Those that are seen."""
    found = [figure._suptitle] if figure._suptitle else []
    for legend in figure.legends:
        found += legend.get_texts()
    for panel in figure.axes:
        found += [panel.title, panel.xaxis.label, panel.yaxis.label]
        found += panel.get_legend().get_texts() if panel.get_legend() else []
        for axis in (panel.xaxis, panel.yaxis):
            least, most = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if least <= tick.get_loc() <= most]
    return [text for text in found if text.get_visible() and text.get_text()]


@pytest.mark.parametrize("name", SWEEPS)
def test_every_text_is_whole_and_none_lies_on_another(name, sketch):
    figure = sketch(name)
    figure.draw_without_rendering()
    whole = figure.bbox.padded(1)
    boxes = {}
    for part in figure.subfigs:
        for text in texts(part):
            box = text.get_window_extent()
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1, text
            assert whole.y0 <= box.y0 and box.y1 <= whole.y1, text
            if not text.get_rotation():
                boxes[text] = box.padded(-1)
    for (one, box), (other, there) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(there), (one, other)


def legend_of(part: FigureBase) -> list[str]:
    return [text.get_text() for legend in part.legends for text in legend.get_texts()]


def ticks(panel) -> list[str]:
    return [text.get_text() for text in panel.get_xticklabels()]


def test_options_whose_values_go_together_share_a_panel_that_shows_all_of_them(sketch):
    top, below = sketch("values that go together").subfigs
    (panel,) = below.axes
    assert panel.get_xlabel().split() == list(PLANS)
    assert [label.split() for label in ticks(panel)] == [
        [*map(str, row)] for row in zip(*PLANS.values(), strict=True)
    ]
    # One of them tells the runs apart.
    assert legend_of(top) == ["resize=native  (best)", "resize=square", "resize=padded", "resize=tiles"]


def test_a_grid_has_a_panel_for_each_option_with_a_line_for_each_value_of_the_others(sketch):
    top, below = sketch("a grid").subfigs
    by_name, by_rate = below.axes
    assert ticks(by_name) == ["AdamW", "Muon"] and ticks(by_rate) == ["0.0005", "0.004", "0.03"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in by_rate.lines}
    assert lines == {
        "optimizer.name=AdamW": [[5e-4, 1], [4e-3, 2], [3e-2, 3]],
        "optimizer.name=Muon": [[5e-4, 4], [4e-3, 5], [3e-2, 6]],
    }
    assert legend_of(top)[:2] == ["optimizer.name=AdamW, lr=0.0005  (best)", "optimizer.name=AdamW, lr=0.004"]


def test_a_line_goes_through_the_means_of_seeds(sketch):
    (panel,) = sketch("an option with seeds").subfigs[1].axes
    (line,) = panel.lines
    assert line.get_xydata().tolist() == [[5e-4, 2], [4e-3, 5], [3e-2, 8]]


def test_seeds_of_which_one_has_diverged_have_a_mean_that_is_no_number():
    results = results_of(Space(RATES, [], {}, 0, 0, 2), "validate/loss")
    results.runs[0].record.history[-1]["validate/loss"] = math.nan
    means = [line.split()[-2:] for line in table(results).split("\n\n")[1].splitlines()]
    assert means == [["mean", "deviation"], ["nan", "-"], ["3.5", "0.70711"], ["5.5", "0.70711"]]
    (axis, _), panel = results.axes, pyplot.figure().subplots()
    draw_panel(panel, results, axis, lines_of(results, results.runs, axis), {}, width=9)
    assert np.isnan(panel.lines[0].get_ydata()).tolist() == [True, False, False]
    pyplot.close(panel.figure)


def test_draws_have_no_lines_and_the_colour_of_their_run(sketch):
    top, below = sketch("few draws").subfigs
    colours = [handle.get_color() for handle in top.legends[0].legend_handles]
    for panel in below.axes:
        assert panel.get_legend() is None
        seen = {tuple(c.get_edgecolor()[0]) for c in panel.collections if c.get_sizes()[0] < BEST["s"]}
        assert seen == {pyplot.matplotlib.colors.to_rgba(colour) for colour in colours}


def test_many_runs_are_named_by_a_line_of_the_best(sketch):
    top, _ = sketch("draws").subfigs
    (said,) = legend_of(top)
    assert said.endswith("(best); the others from the best (dark) to the worst")


def test_a_score_that_rises_is_drawn_as_it_is_and_a_loss_that_spans_much_by_its_logarithm(sketch):
    scales = [
        [panel.get_yscale() for panel in part.axes]
        for metric in ("validate/exact", "validate/loss")
        for part in sketch("many values", metric).subfigs
    ]
    assert scales == [["log", "linear"], ["linear"], ["log", "log"], ["log"]]


def test_values_that_span_much_stand_by_their_logarithm(sketch):
    scales = {
        name: [panel.get_xscale() for panel in sketch(name).subfigs[1].axes]
        for name in ("draws", "few draws")
    }
    assert scales == {"draws": ["log", "linear"], "few draws": ["log", "linear"]}
