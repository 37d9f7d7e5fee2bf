"""`torchtitan-vlm tune`. The trainer is a stand-in, but in the last test."""

import csv
import json
import signal
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from experiments.__main__ import CONFIG_CLASSES
from experiments.commands import main
from experiments.commands import tune as command
from experiments.vlm.check import check_vlm
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.costs import tuning
from experiments.vlm.costs.estimate import Estimate
from experiments.vlm.costs.tuning import with_settings
from torchtitan.config.errors import require
from torchtitan.config.layout import Degrees, resolve_batch
from torchtitan.config.parse import parse_over, read_toml
from torchtitan.distributed.estimate import Memory
from torchtitan.sweep.run import Sweeper
from torchtitan.tools.hardware import GIB

# Its work a second follows from the slots of a forward and from L; eight slots are too many for the memory.
STAND_IN = """import json, sys, tomllib
from pathlib import Path
job = tomllib.loads(Path(sys.argv[1]).read_text())
folder, slots = Path(job["job"]["dump_folder"]), job["training"]["local_batch_size"]
with (folder.parent / "started.txt").open("a") as file:
    print(folder.name, file=file)
if slots == 8:
    sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
work = (1 + slots) * (1.2 if job["data"]["patches_per_row"] == 956 else 1)
figures = {"tflops": work, "step_s": 1 / work, "memory": 1.5, "tps": 100.0, "data_wait": 7.0}
with (folder / "metrics.jsonl").open("w") as file:
    for step in range(1, job["training"]["steps"] + 1):
        print(json.dumps(figures | {"step": step, "tokens": 99.5, "patches": 98.0}), file=file)
"""
JOB = ["--job.config_file", "vlm_debug", "--training.global_batch_size", "8", "--memory_gib", "40"]


def planned(shares, job: VLMJobConfig, sizes: Degrees) -> Estimate:
    """In place of the planner: four GiB a slot, and no layer to recompute."""
    budget, peak = job.activation_checkpoint.memory_budget_gib, 4.0 * job.training.local_batch_size
    require(not budget or peak <= budget, "memory_budget_gib: too little")
    job = with_settings(job, {"activation_checkpoint.memory_budget_gib": 0.0})
    memory = Memory("the test", peak * GIB, 0, 0, 0, 0)
    return Estimate(job, sizes, resolve_batch(job, 1), memory, 0, 10**9, {}, ())


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "Shares", lambda *_: None)
    monkeypatch.setattr(tuning, "estimate_with", planned)
    file = tmp_path / "trainer.py"
    file.write_text(STAND_IN)
    monkeypatch.setattr(command, "train_command", lambda job: [sys.executable, str(file), str(job)])
    monkeypatch.setattr(command, "gpus_of", lambda variables: [])
    monkeypatch.setattr(command, "costs_of_lengths", lambda *_: {976: 2.0, 956: 1.9, 1952: 1.99})
    for name in ("NGPU", "CONFIG_FILE", "DRY_RUN", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def started(out: Path) -> list[str]:
    file = out / "started.txt"
    return file.read_text().splitlines() if file.exists() else []


def test_the_command_ends_with_a_table_files_and_lines_that_make_the_best_job(stand_in, tmp_path, capsys):
    out = tmp_path / "a"
    assert main(["tune", *JOB, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    names = started(out)
    assert names[:2] == ["the_job", "patches_per_row=956"] and max(Counter(names).values()) == 1
    assert "patches_per_row=956,local_batch_size=8" in names
    numbers = json.loads((out / "tune.json").read_text())
    best = numbers["candidates"][numbers["best"]]
    assert (best["B"], best["L"], best["useful_tflops"], best["x_the_job"]) == ("4", "956", 6.0, 2.0)
    with (out / "tune.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows].count("too large") == 1 and len(rows) == len(names) - 2
    assert (
        names[-2:] == ["the_job,again", "patches_per_row=956,local_batch_size=4,again"] and best["runs"] == 2
    )
    assert "out of memory" in said and "2.00 times its useful work a second" in said
    assert "the trainer waits for data 7 % of its time: raise data.num_workers first" in said
    (starred,) = [line.split() for line in said.splitlines() if line.strip().startswith("*")]
    assert starred[1:3] == ["4", "956"]
    lines = tomllib.loads(said[said.index("\n[") : said.index("all of the job")])
    assert lines == {"data": {"patches_per_row": 956}, "training": {"local_batch_size": 4}}
    pasted = read_toml("vlm_debug")
    for section, options in lines.items():
        pasted[section] |= options
    job = parse_over(pasted, JOB[2:4], CONFIG_CLASSES)
    check_vlm(job, 1)
    whole = parse_over(read_toml(str(out / "best.toml")), [], CONFIG_CLASSES)
    whole.job.config_file = job.job.config_file
    assert whole == job


def test_the_same_command_starts_nothing_that_was_measured(stand_in, tmp_path, capsys, monkeypatch):
    asked = ["tune", *JOB, "--out", str(tmp_path / "a")]
    assert main(asked) == 0
    monkeypatch.setattr(command, "costs_of_lengths", lambda *_: pytest.fail("the adviser is asked again"))
    first, names = capsys.readouterr().out, started(tmp_path / "a")
    assert main(asked) == 0
    assert capsys.readouterr().out.endswith(first[first.index("  wait %") :])
    assert started(tmp_path / "a") == names


def test_ctrl_c_tells_the_best_so_far(stand_in, tmp_path, capsys, monkeypatch):
    run = Sweeper.run

    def interrupted(sweeper: Sweeper):
        if len(started(tmp_path / "a")) == 2:
            return signal.SIGINT
        return run(sweeper)

    monkeypatch.setattr(Sweeper, "run", interrupted)
    assert main(["tune", *JOB, "--out", str(tmp_path / "a")]) == 130
    said = capsys.readouterr()
    assert "patches_per_row = 956\n" in said.out and "the time was over" not in said.out
    assert said.err == "stopped by SIGINT; the same command goes on\n"


def test_a_job_that_fails_is_told_with_its_last_line(stand_in, tmp_path, capsys, monkeypatch):
    failing = [sys.executable, "-c", "raise SystemExit('no such kernel')"]
    monkeypatch.setattr(command, "train_command", lambda job: failing)
    assert main(["tune", *JOB, "--out", str(tmp_path / "a")]) == 2
    why = f"exit code 1 (no such kernel); see {tmp_path}/a/the_job/log.txt"
    assert capsys.readouterr().err == f"error: the job as it is does not run: {why}\n"


def test_a_dry_run_lists_what_would_be_tried(stand_in, tmp_path, capsys):
    assert main(["tune", *JOB, "--out", str(tmp_path / "a"), "--job.dry_run"]) == 0
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    place = lines.index(["B", "L", "chunk"])
    assert lines[place + 1 : place + 7] == [
        ["2", "976", "4096"],
        ["2", "956", "4096"],
        ["2", "1952", "4096"],
        *([b, "976", "4096"] for b in "481"),
    ]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--minutes", "0"], "--minutes = 0.0: must be > 0"),
        (["--records", "2"], "--records = 2: must be >= 3"),
        (["--job.config_file", "nowhere.toml"], "job.config_file = nowhere.toml: No such file"),
        (["--data.sources.0.path", "nowhere/*.tar"], "data.sources[0].path = nowhere/*.tar: no such file"),
        (["--training.global_batch_size", "3"], "training.global_batch_size = 3 is not a multiple"),
        (
            ["--activation_checkpoint.memory_budget_gib", "1"],
            "memory_budget_gib: too little",
        ),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(stand_in, tmp_path, capsys, options, told):
    assert main(["tune", *JOB, "--out", str(tmp_path / "a"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {told}") and error.count("\n") == 1 and not started(tmp_path / "a")


@pytest.mark.slow
def test_the_trainer_itself_is_measured(tmp_path, capsys):
    small = [
        *("--job.config_file", "vlm_debug", "--training.seq_len", "256", "--data.patches_per_row", "512"),
        *("--training.dataset", "cc12m", "--training.dataset_path", "embedded:sees/heldout"),
        *("--records", "3", "--minutes", "10", "--out", str(tmp_path / "a")),
    ]
    assert main(["tune", *small]) == 0
    numbers = json.loads((tmp_path / "a" / "tune.json").read_text())
    own, *others = numbers["candidates"]
    assert others and all(row["state"] == "measured" for row in (own, *others))
    assert all(row["useful_tflops"] > 0 and 0 < row["tokens"] <= 100 for row in (own, *others))
    assert {path.name for path in (tmp_path / "a" / "the_job").iterdir()}.isdisjoint(
        {"checkpoint", "tb", "curves.png"}
    )
