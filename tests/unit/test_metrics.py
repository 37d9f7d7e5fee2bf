"""The printed line, occupancy, and the history that curves are drawn from."""

from types import SimpleNamespace

import pytest
import torch

from torchtitan.components import metrics
from torchtitan.components.curves import draw_curves
from torchtitan.components.metrics import Counts, MetricsMeter, Reporter, SourceLosses, format_line
from torchtitan.components.sinks import HISTORY, History, read_history
from torchtitan.config.job import JobConfig
from torchtitan.tools.logging import log_ranks


def test_the_line_of_a_step():
    values = {
        "loss": 3.14159265,
        "grad_norm": 0.5,
        "memory": 1.25,
        "tps": 12345.6,
        "tflops": 0.25,
        "mfu": None,
    }
    values |= {"patches": 97.13, "tokens": 99.0, "images/s": 12.34, "data_wait": 0.04}
    assert format_line(12, values, ("patches", "tokens")) == (
        "step: 12 loss: 3.14159 grad_norm: 0.50000 memory: 1.25GiB tps: 12,346 tflops: 0.250 mfu: n/a "
        "patches: 97.1% tokens: 99.0% images/s: 12.3 data_wait: 0.0%"
    )


def test_occupancy_and_rates_count_what_all_ranks_did(monkeypatch):
    clock = iter([0.0, 0.0, 10.0, 10.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    capacity = {"tokens": 100, "patches": 50}
    counts = Counts(
        "loss_tokens",
        "tokens",
        capacity,
        rates=("images",),
        tallies=("samples/a",),
        sources=("a",),
        held_out=(),
    )
    meter = MetricsMeter(torch.device("cpu"), 2, counts)
    meter.restart()
    meter.add(
        {"tokens": 300, "patches": 100, "images": 7, "samples/a": 4, "slots": 4, "flops": 6e12}, data_s=0.5
    )
    meter.add(
        {"tokens": 200, "patches": 100, "images": 3, "samples/a": 2, "slots": 4, "flops": 4e12}, data_s=0.5
    )
    meter.leave_out(5.0)  # of the ten seconds five were validation
    read, tallies = meter.read()
    assert tallies == {"samples/a": 6, "step_s": 2.5}
    assert read["tokens"] == 62.5 and read["patches"] == 50.0
    assert read["images/s"] == 2.0 and read["tps"] == 50.0 and read["tflops"] == 1.0
    assert read["data_wait"] == 20.0 and read["mfu"] is None


def test_the_loss_of_a_source_is_that_of_a_token_of_all_steps_since_the_last_line(monkeypatch):
    monkeypatch.setattr(metrics, "sum_over_ranks", lambda sums: sums * 6)  # three ranks, twice each
    losses = SourceLosses(torch.device("cpu"), Counts("weight", "tokens", {}, (), (), ("a", "b", "c"), ()))
    for step in ([4.0, 1.0, 0.0], [8.0, 1.0, 0.0]):
        losses.add(torch.tensor(step))
    assert losses.read({"weight/a": 9, "weight/b": 2, "weight/c": 0}, copies=2) == {
        "loss/a": 4.0,
        "loss/b": 3.0,
    }
    assert losses.read({"weight/a": 1, "weight/b": 1, "weight/c": 1}, copies=2) == dict.fromkeys(
        ("loss/a", "loss/b", "loss/c"), 0.0
    )


def open_reporter(folder, first_step: int = 0) -> Reporter:
    job = JobConfig()
    job.job.dump_folder = str(folder)
    return Reporter(job, ("tokens",), ("right",), first_step, rank=0, world_size=1)


def test_no_chart_is_of_zeros_alone_and_one_that_began_goes_on(tmp_path):
    reporter = open_reporter(tmp_path)
    reporter.train(1, {"loss": 2.0, "rejected/a": 0.0, "mfu": None}, {"rejected/b": 0.0})
    reporter.train(2, {"loss": 0.0, "rejected/a": 3.0}, {"rejected/b": 0.0})
    open_reporter(tmp_path, 2).train(3, {"loss": 1.0, "rejected/a": 0.0}, {"rejected/b": 0.0})
    assert read_history(tmp_path) == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 0.0, "rejected/a": 3.0},
        {"step": 3, "loss": 1.0, "rejected/a": 0.0},
    ]


def test_the_history_has_zeros_of_held_out_figures_and_no_chart_shows_them(tmp_path, figures):
    reporter, charts = open_reporter(tmp_path), []
    reporter.sinks.append(SimpleNamespace(write=lambda step, values: charts.append((step, dict(values)))))
    reporter.validate(1, {"right": 0.0, "exact": 0.0, "thin": None})
    reporter.validate(2, {"right": 5.0, "exact": 0.0, "thin": None})
    kept = [
        {"step": step, "validate/right": right, "validate/exact": 0.0} for step, right in ((1, 0.0), (2, 5.0))
    ]
    assert read_history(tmp_path) == kept and charts == [(1, {}), (2, {"validate/right": 5.0})]
    draw_curves(tmp_path, (), ())
    assert drawn(figures[0]) == {"held-out tokens right, %": {"all": [[1, 0.0], [2, 5.0]]}}


def test_validation_names_each_of_several_sources(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(metrics.logger, "propagate", True)
    with caplog.at_level("INFO"):
        open_reporter(tmp_path).validate(7, {"loss": 1.5, "right": 50.0, "loss/a": 1.0, "right/a": 60.0})
        open_reporter(tmp_path).validate(8, {"loss": 1.5, "loss/a": 1.0, "tokens/a": 76.0, "loss/b/c": 2.0})
    assert caplog.messages == [
        "validate step: 7 loss: 1.50000 right: 50.0%",
        "validate step: 8 loss: 1.50000",
        "validate a step: 8 loss: 1.00000 tokens: 76",
        "validate b/c step: 8 loss: 2.00000",
    ]


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    history = History(tmp_path, first_step=0)
    for step in range(1, 5):
        history.write(step, {"loss": 1.0 / step})
    with (tmp_path / HISTORY).open("ab") as file:
        file.write(b'\xff\xfe\n{"step": 5, "lo')  # damaged, and cut short by a kill
    History(tmp_path, first_step=2).write(3, {"loss": 9.0})
    assert [(record["step"], record["loss"]) for record in read_history(tmp_path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 9.0),
    ]


def drawn(figure) -> dict[str, dict[str, list[list[float]]]]:
    """Title of each panel -> label -> points."""
    return {
        panel.get_title(): {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
        for panel in figure.axes
    }


def test_curves_are_those_of_the_history(tmp_path, figures):
    history = History(tmp_path, first_step=0)
    rates = {"lr": 1e-3, "lr/encoder": 1e-4}
    history.write(
        1, {"loss": 3.0, "tokens": 99.0, "grad_norm": 2.0, "tps": 50.0, "loss/a": 4.0, "loss/b": 2.0}
    )
    history.write(2, {"loss": 2.0, "tokens": 98.0, "loss/a": 3.0} | rates)
    held_out = {"loss": 2.5, "right": 60.0, "exact": 40.0, "thin": 30.0, "loss/a": 2.0, "loss/c$_$": 3.0}
    history.write(2, {f"validate/{name}": value for name, value in held_out.items()})
    assert draw_curves(tmp_path, ("tokens",), ("thin",)).is_file()
    assert drawn(figures[0]) == {
        "loss, nats a token": {"training": [[1, 3.0], [2, 2.0]], "held out": [[2, 2.5]]},
        "loss by source": {
            "a": [[1, 4.0], [2, 3.0]],
            "b": [[1, 2.0]],
            "a, held out": [[2, 2.0]],
            r"c\$_\$, held out": [[2, 3.0]],
        },
        "held-out tokens right, %": {"all": [[2, 60.0]]},
        "held-out documents exact, %": {"all": [[2, 40.0]], "thin": [[2, 30.0]]},
        "learning rate": {"lr": [[2, 1e-3]], "lr/encoder": [[2, 1e-4]]},
        "gradient norm, before clipping": {"gradient norm": [[1, 2.0]]},
        "tokens a second, of one device": {"tokens": [[1, 50.0]]},
        "occupancy of slots, %": {"tokens": [[1, 99.0], [2, 98.0]]},
    }
    scales = {panel.get_title(): panel.get_yscale() for panel in figures[0].axes}
    assert [title for title, scale in scales.items() if scale == "log"] == [
        "loss, nats a token",
        "loss by source",
        "learning rate",
        "gradient norm, before clipping",
    ]
    first = next(panel for panel in figures[0].axes if panel.get_title() == "loss by source")
    colours = {line.get_label(): line.get_color() for line in first.lines}
    assert colours["a"] == colours["a, held out"] and len(set(colours.values())) == 3


@pytest.mark.parametrize("names", [(), ("loss",), ("loss", "grad_norm", "tps", "tokens", "epochs/a")])
def test_no_panel_is_empty(tmp_path, figures, names):
    History(tmp_path, first_step=0).write(1, dict.fromkeys(names, 2.0))
    assert draw_curves(tmp_path, ("tokens", "patches"), ("thin",)).is_file()
    assert [len(panel.lines) for panel in figures[0].axes] == [1] * len(names)


def test_log_rank_names_ranks_that_there_are(monkeypatch):
    for value, ranks in (("0", {0}), ("1,3", {1, 3}), ("9", {0}), ("nonsense", {0})):
        monkeypatch.setenv("LOG_RANK", value)
        assert log_ranks(4) == ranks
