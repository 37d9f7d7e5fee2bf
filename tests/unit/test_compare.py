"""The page that compares runs says what their folders say, and nothing else."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from experiments.commands import main
from experiments.commands.compare_runs import OCCUPANCY
from experiments.vlm.data.batch_metrics import BATCH_METRICS
from tests.samples import write_jsonl
from torchtitan.compare.charts import MOST_POINTS, charts, group_of
from torchtitan.compare.page import options_table
from torchtitan.compare.runs import Named, differing, read_runs, short_names
from torchtitan.components.run_record import RunRecord, is_better, lower_is_better, place_of_best, read_run
from torchtitan.config.errors import ConfigError

CONFIG = """[job]
dump_folder = "{folder}"
[optimizer]
lr = {lr}
[training]
global_batch_size = 4
seq_len = 100
[[data.sources]]
name = "cap"
weight = {weight}
"""


def write_run(folder: Path, records: list[dict], lr: float = 0.1, weight: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG.format(folder=folder, lr=lr, weight=weight))
    write_jsonl(folder / "metrics.jsonl", records)
    return folder


@pytest.fixture
def two(tmp_path) -> list[Path]:
    old = [{"step": step, "loss": 5.0 - step, "tps": 10.0, "rejected/x": 0} for step in (1, 2)]
    new = [
        {
            "step": step,
            "loss": 4.0 - step,
            "tokens_seen": 390 * step,
            "wall_s": 1800.0 * step,
            "loss/cap": 2.5,
        }
        for step in (1, 2, 3)
    ]
    held_out = [
        {"step": 2, "validate/loss": 1.5, "validate/loss/cap": 1.25},
        {"step": 3, "validate/loss": 1.75},
    ]
    return [
        write_run(tmp_path / "a", old),
        write_run(tmp_path / "b <i>", new[:2] + held_out[:1] + new[2:] + held_out[1:], lr=0.2),
    ]


class Page(HTMLParser):
    """Rows of the tables of a page, as text; and every address that it would load."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside &= tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])


def test_the_page_tells_options_that_differ_figures_and_curves_and_loads_nothing(two, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["compare", *map(str, two), "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("2 runs, options that differ: optimizer.lr\n")
    page = Page(out.read_text())
    assert page.loads == []
    assert ["option", "a", "b <i>"] in page.rows and ["optimizer.lr", "0.1", "0.2"] in page.rows
    assert not any(row[:1] == ["training.seq_len"] or row[:1] == ["job.dump_folder"] for row in page.rows)
    summary = {row[0]: dict(zip(page.rows[0], row, strict=True)) for row in page.rows[1:3]}
    assert summary["a"]["steps"] == "2" and summary["a"]["tokens"] == "800" and summary["a"]["hours"] == ""
    b = summary["b <i>"]
    assert (b["tokens"], b["hours"], b["loss"]) == ("1170", "1.5", "1")
    assert (b["held-out loss, last"], b["best"], b["at step"]) == ("1.75", "1.5", "2")
    assert ["loss/cap", "", "2.5"] in page.rows and ["validate/loss/cap", "", "1.25"] in page.rows

    data = data_of(out.read_text())
    assert [run["name"] for run in data["runs"]] == ["a", "b <i>"]
    drawn = {chart["key"]: chart for chart in data["charts"]}
    # Neither what is always zero nor what is an axis.
    assert set(drawn) == {"loss", "tps", "loss/cap", "validate/loss", "validate/loss/cap"}
    a, b = drawn["loss"]["series"]
    assert a == {"run": 0, "steps": [1, 2], "tokens": [400, 800], "hours": None, "values": [4, 3]}
    assert (b["tokens"], b["hours"]) == ([390, 780, 1170], [0.5, 1.0, 1.5])
    # A held-out figure has no place of its own on the axes: that of its step.
    assert drawn["validate/loss"]["series"][0]["hours"] == [1.0, 1.5]


def test_what_is_no_number_is_a_gap(tmp_path):
    folder = write_run(tmp_path / "a", [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf")}])
    records = [*read_run(folder).history, {"step": 3, "loss": 1.0}]
    (chart,) = charts([Named("a", RunRecord(folder, {}, records))], ())
    assert chart["series"][0]["values"] == [None, None, 1.0] and chart["series"][0]["tokens"] is None
    assert read_run(folder).best("loss") is None and RunRecord(folder, {}, records).best("loss") == (1.0, 3)
    assert main(["compare", str(folder), "--out", str(tmp_path / "page.html")]) == 0


def test_a_long_curve_is_thinned_and_keeps_its_ends(tmp_path):
    records = [{"step": step, "loss": float(step)} for step in range(1, 5 * MOST_POINTS + 4)]
    (chart,) = charts([Named("a", RunRecord(tmp_path, {}, records))], ())
    steps = chart["series"][0]["steps"]
    assert len(steps) <= MOST_POINTS + 1 and (steps[0], steps[-1]) == (1, len(records))
    assert chart["series"][0]["values"] == steps


@pytest.mark.parametrize(
    ("key", "group"),
    [
        ("loss", "Training"),
        ("lr/encoder", "Training"),
        ("validate/loss", "Held out"),
        ("validate/exact/cap", "By source"),
        ("tokens/cap", "By source"),
        ("images/s", "Throughput"),
        ("tflops", "Throughput"),
        ("tokens", "Occupancy"),
        ("rejected/x", "Other"),
    ],
)
def test_figures_stand_in_groups(key, group):
    assert group_of(key, {"cap"}, ("tokens", "patches")) == group


def test_an_option_that_one_run_lacks_differs(tmp_path):
    with_it, without = (
        RunRecord(tmp_path, {"lora": {"rank": 4}, "a": {"b": 1}}, []),
        RunRecord(tmp_path, {"a": {"b": 1}}, []),
    )
    assert differing([with_it, without]) == {"lora.rank": [4, None]}


def test_options_that_nobody_knows_are_called_so_and_make_no_difference(tmp_path):
    unknown, *known = (
        RunRecord(tmp_path, config, []) for config in ({}, {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
    )
    assert differing([unknown, *known]) == {"a.c": [None, 2, 3]} and differing([unknown, known[0]]) == {}
    page = options_table([Named(f"{n}", run) for n, run in enumerate([unknown, *known])])
    assert Page(page).rows == [["option", "0", "1", "2"], ["a.c", "not known", "2", "3"]]


def test_a_folder_of_runs_is_all_of_them_each_once(two, tmp_path):
    assert [run.name for run in read_runs([str(tmp_path)])] == ["a", "b <i>"]
    assert [run.name for run in read_runs([str(two[0]), f"{tmp_path}/", f"{two[0]}/."])] == ["a", "b <i>"]


def test_names_are_as_long_as_it_takes():
    assert short_names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert short_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["nowhere"], "error: nowhere: no such folder (looked from "),
        (["."], "error: .: holds no metrics.jsonl, nor does a folder in it; give dump folders of runs\n"),
        ([], "error: which runs? Give their dump folders\n"),
    ],
)
def test_what_is_no_run_is_one_line(given, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith(told) and said.count("\n") == 1


def test_the_page_has_a_name_that_a_browser_opens(two, capsys):
    assert main(["compare", str(two[0]), "--out", "page.png"]) == 2
    assert capsys.readouterr().err == "error: --out = page.png: must end in .html\n"


def test_which_of_two_figures_is_better():
    assert lower_is_better("validate/loss") and not lower_is_better("validate/exact")
    assert lower_is_better("step_s") and not lower_is_better("validate/exact/timelines")
    assert lower_is_better("validate/perplexity-books/perplexity")
    assert not lower_is_better("validate/caption-loss/cider")
    assert lower_is_better("blanked/loss/a") and not lower_is_better("validate/right/normal memory")
    assert is_better("loss", 1, than=2) and is_better("validate/exact", 2, than=1)
    assert is_better("loss", 9, than=float("nan")) and not is_better("loss", float("nan"), than=9)
    values = [None, float("nan"), 3.0, 1.0, 2.0]
    assert place_of_best("loss", values) == 3 and place_of_best("validate/exact", values) == 2
    assert place_of_best("loss", values[:2]) is None


def test_a_step_between_two_records_has_its_share_of_the_tokens(tmp_path):
    record = RunRecord(tmp_path, {}, [{"step": 10, "tokens_seen": 100}, {"step": 20, "tokens_seen": 300}])
    assert record.on_axis(np.array([5.0, 15.0, 20.0]), "tokens").tolist() == [50, 200, 300]
    assert record.on_axis(np.array([5.0]), "hours") is None

    with pytest.raises(ConfigError):
        read_runs([str(tmp_path / "not there")])


def test_every_figure_of_a_batch_that_has_a_limit_is_one_of_occupancy():
    assert set(OCCUPANCY) == {name for name, count in BATCH_METRICS.items() if count.capacity}
