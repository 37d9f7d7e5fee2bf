"""What a sweep starts, skips, goes on with and stops. The trainer is a stand-in, but in the last test."""

import contextlib
import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from experiments.commands import sweep
from experiments.commands import train as train_command
from torchtitan.config.errors import ConfigError
from torchtitan.config.parse import parse
from torchtitan.sweep.status import LOCK
from torchtitan.tools.lock import take_lock

REPOSITORY = Path(__file__).parents[2]
STAND_IN = REPOSITORY / "tests" / "stand_in_trainer.py"
JOB = ["--job.config_file", "vlm_debug", "--training.steps", "3"]
RATES = "optimizer.lr=1,2"
# A sweep with the stand-in, in a process of its own.
ALONE = f"""import sys
from experiments.commands import sweep
sweep.train_command = lambda job: [sys.executable, {str(STAND_IN)!r}, str(job)]
sys.exit(sweep.main(sys.argv[1:]))"""


@pytest.fixture(autouse=True)
def trainer(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "train_command", lambda job: [sys.executable, str(STAND_IN), str(job)])
    monkeypatch.setattr(sweep, "gpus_of", lambda variables: [])
    for name in ("NGPU", "CONFIG_FILE", "DRY_RUN", "OMP_NUM_THREADS", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def run(out: Path, *options: str) -> int:
    return sweep.main([*JOB, "--out", str(out), *options])


def starts(folder: Path) -> list[dict]:
    """One for each time that the trainer was started."""
    file = folder / "started.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def history(folder: Path) -> list[int]:
    """The steps whose loss is kept, in the order in which they were written."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if "loss" in record]


def wait_for(holds) -> None:
    late = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < late, "it does not come to that"
        time.sleep(0.01)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_sweep_ends_with_a_table_a_csv_and_a_picture_that_name_the_best(tmp_path, capsys):
    out = tmp_path / "a"
    assert run(out, "--sweep", "optimizer.lr=1,2,4", "--seeds", "2") == 0
    table = capsys.readouterr().out
    found = rows(out)
    assert [(row["optimizer.lr"], row["debug.seed"], row["state"]) for row in found] == [
        (lr, seed, "finished") for lr in ("1.0", "2.0", "4.0") for seed in ("0", "1")
    ]
    best = next(row for row in found if row["best_run"] == "True")
    # abs(2 - 2) + 0 / 10 + 1 / 3, and half more at the end; best at step 2.
    assert best["run"] == "lr=2.0,seed=0" and float(best["last validate/loss"]) == pytest.approx(1 / 3 + 0.5)
    assert (float(best["best validate/loss"]), best["step of best validate/loss"]) == (
        pytest.approx(0.5),
        "2",
    )
    assert float(best["last tokens_seen"]) == 300
    starred = [line.split() for line in table.splitlines() if line.strip().startswith("*")]
    assert starred[0][1:5] == ["2", "2.0", "0", "finished"]
    # Both seeds of the best rate: the mean of 0.8333 and 0.9333.
    assert starred[1][1:4] == ["2.0", "2", "0.88333"]
    assert "best: lr=2.0,seed=0 (validate/loss 0.83333)" in table
    with Image.open(out / "sweep.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 20


def test_what_is_finished_is_left_alone_what_failed_is_tried_again_and_stops_nothing(tmp_path, capsys):
    out = tmp_path / "a"
    asked = ["--sweep", "optimizer.weight_decay=1,13,2"]
    assert run(out, *asked) == 1
    said = capsys.readouterr()
    assert "weight_decay=13.0: failed: exit code 3 (error: it does not like 13); see" in said.err
    assert [row["state"] for row in rows(out)] == ["finished", "failed", "finished"]
    assert run(out, *asked) == 1
    assert [len(starts(out / f"weight_decay={value}")) for value in ("1.0", "13.0", "2.0")] == [1, 2, 1]


def test_more_values_join_a_sweep_and_more_steps_go_on(tmp_path):
    out = tmp_path / "a"
    assert run(out, "--sweep", RATES) == run(out, "--sweep", RATES + ",3") == 0
    assert [len(starts(out / f"lr={value}")) for value in ("1.0", "2.0", "3.0")] == [1, 1, 1]
    assert run(out, "--sweep", RATES, "--training.steps", "5") == 0
    assert [start["first"] for start in starts(out / "lr=1.0")] == [0, 3]
    assert history(out / "lr=1.0") == [1, 2, 3, 4, 5]


def test_another_job_is_refused_before_anything_starts(tmp_path):
    out = tmp_path / "a"
    assert run(out, "--sweep", RATES) == 0
    with pytest.raises(ConfigError, match="was begun with other options: optimizer.beta1 was 0.9 and is 0.5"):
        run(out, "--sweep", RATES + ",3", "--optimizer.beta1", "0.5")
    with pytest.raises(ConfigError, match="training.steps was 3 and is 2; give another --out"):
        run(out, "--sweep", RATES, "--training.steps", "2")
    assert not (out / "lr=3.0").exists() and len(starts(out / "lr=1.0")) == 1
    # How a run is watched, and how its data are read, is no other job.
    assert run(out, "--sweep", RATES, "--metrics.log_freq", "7", "--data.num_workers", "2") == 0
    assert len(starts(out / "lr=1.0")) == 1


def test_a_combination_that_cannot_run_is_told_before_the_first_starts(tmp_path):
    out = tmp_path / "a"
    with pytest.raises(ConfigError, match=r"run 1 \(lr=-1.0\): optimizer.lr = -1.0: must be > 0"):
        run(out, "--sweep", "optimizer.lr=1,-1")
    with pytest.raises(
        ConfigError, match=r"run 0 \(patches_per_row=975\): data.patches_per_row = 975 is not a"
    ):
        run(out, "--sweep", "data.patches_per_row=975,976")
    with pytest.raises(ConfigError, match="--optimizer.lr: is swept too; keep one of the two"):
        run(out, "--sweep", "optimizer.lr=1,2", "--optimizer.lr=5")
    assert not out.exists()


def test_the_folder_of_a_run_is_no_place_for_a_sweep(tmp_path):
    (tmp_path / "config.toml").touch()
    with pytest.raises(ConfigError, match="is the folder of a run itself; give another --out"):
        run(tmp_path, "--sweep", RATES)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_all_and_the_same_command_goes_on(tmp_path, number):
    out = tmp_path / "a"
    out.mkdir()
    (out / "wait").touch()
    asked = [*JOB, "--out", str(out), "--sweep", RATES + ",3", "--at_once", "2"]
    process = alone(asked)
    wait_for(lambda: all((out / f"lr={rate}" / "metrics.jsonl").exists() for rate in ("1.0", "2.0")))
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert told == f"stopped by {number.name}: 0 of 3 runs are finished; the same command goes on\n"
    assert not (out / "lr=3.0").exists() and not any(is_alive(out / f"lr={rate}") for rate in ("1.0", "2.0"))
    (out / "wait").unlink()
    assert sweep.main(asked) == 0
    assert [start["first"] for start in starts(out / "lr=1.0")] == [0, 1]
    assert history(out / "lr=1.0") == [1, 2, 3] == history(out / "lr=3.0")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_runs_end_with_a_sweep_that_is_killed_and_go_on_with_the_next(tmp_path):
    out = tmp_path / "a"
    out.mkdir()
    (out / "wait").touch()
    asked = [*JOB, "--out", str(out), "--sweep", RATES]
    process = alone(asked)
    wait_for((out / "lr=1.0" / "metrics.jsonl").exists)
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not is_alive(out / "lr=1.0"))
    (out / "wait").unlink()
    assert sweep.main(asked) == 0
    assert [start["first"] for start in starts(out / "lr=1.0")] == [0, 1]


def test_a_run_that_another_process_has_in_hand_is_left_to_it(tmp_path, capsys):
    out = tmp_path / "a"
    held = take_lock(out / "lr=1.0" / LOCK)
    assert held is not None
    free = threading.Timer(0, lambda: (wait_for((out / "lr=2.0" / "sweep.json").exists), os.close(held)))
    free.start()
    assert run(out, "--sweep", RATES) == 0
    free.join()
    said = capsys.readouterr().out
    assert (
        said.index("lr=1.0: another process runs it")
        < said.index("lr=2.0: starts")
        < said.index("lr=1.0: starts")
    )


def test_runs_beside_each_other_have_devices_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "gpus_of", lambda variables: ["4", "7"])
    out = tmp_path / "a"
    out.mkdir()
    (out / "wait").touch()
    both = [out / f"lr={rate}" / "metrics.jsonl" for rate in ("1.0", "2.0")]

    def go_on() -> None:
        wait_for(lambda: all(path.exists() for path in both))
        (out / "wait").unlink()

    second = threading.Thread(target=go_on)
    second.start()
    assert run(out, "--sweep", RATES + ",3") == 0
    second.join()
    devices = [starts(out / f"lr={rate}")[0]["CUDA_VISIBLE_DEVICES"] for rate in ("1.0", "2.0", "3.0")]
    assert devices[:2] == ["4", "7"] and devices[2] in devices[:2]
    assert starts(out / "lr=1.0")[0]["NGPU"] == "1"


def alone(asked: list[str]) -> subprocess.Popen:
    """The sweep in a process of its own."""
    pipe = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, "-c", ALONE, *asked], env=environment, **pipe)


def is_alive(folder: Path) -> bool:
    """Whether the trainer that was started last is there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(starts(folder)[-1]["pid"], 0)
        return True
    return False


def test_one_run_alone_by_its_index(tmp_path, capsys):
    out = tmp_path / "a"
    assert run(out, "--sweep", RATES, "--index", "1") == 0
    assert starts(out / "lr=2.0") and not (out / "lr=1.0").exists() and not (out / "sweep.csv").exists()
    with pytest.raises(ConfigError, match="--index = 2: the runs are 0 to 1"):
        run(out, "--sweep", RATES, "--index", "2")
    capsys.readouterr()
    assert run(out, "--sweep", RATES, "--report") == 0
    assert [row["state"] for row in rows(out)] == ["new", "finished"]


def test_an_array_of_slurm_runs_what_is_not_finished(tmp_path, monkeypatch):
    """A stand-in for sbatch reads the header and starts the script once for each index, as Slurm would."""
    out, job = tmp_path / "a b", tmp_path / "sweep.toml"
    job.write_text(
        (REPOSITORY / "train_configs/vlm_debug.toml").read_text()
        + "\n[sweep.grid]\noptimizer.lr = [1, 2, 3]\n"
    )
    asked = ["--job.config_file", str(job), "--training.steps", "3", "--out", str(out)]
    assert sweep.main([*asked, "--index", "1"]) == 0
    monkeypatch.setenv("NGPU", "1")
    assert (
        sweep.main([*asked, "--slurm", "--at_once", "2", "--slurm_options", "time=1:00", "comment=two words"])
        == 0
    )
    script = out / "sweep.sbatch"
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    header = [word for line in lines for word in shlex.split(line.removeprefix("#SBATCH "))]
    assert {"--array=0,2%2", "--time=1:00", "--comment=two words", "--job-name=a b"} <= set(header)
    assert f"--output={out}/slurm/%a.log" in header and all(word.startswith("--") for word in header)
    job.unlink()  # the array reads a copy
    monkeypatch.chdir("/")
    # The stand-in trainer, in the process that the script becomes.
    text = script.read_text().replace("-m experiments.commands sweep", '-c "$ALONE"')
    for index in (0, 2):
        environment = os.environ | {"SLURM_ARRAY_TASK_ID": str(index), "ALONE": ALONE}
        done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert [len(starts(out / f"lr={rate}.0")) for rate in (1, 2, 3)] == [1, 1, 1]
    assert starts(out / "lr=1.0")[0]["NGPU"] == "1"


@pytest.mark.parametrize("off", ["--checkpoint.no_enable", "--checkpoint.no-enable"])
def test_checkpoints_are_on_unless_the_command_line_says_otherwise_however_it_is_spelled(off):
    tables = {}
    assert sweep.save_runs(tables, []) and tables["checkpoint"] == {"enable": True}
    assert not sweep.save_runs({}, [off])


def test_a_dry_run_lists_the_runs_with_what_they_cost_and_starts_none(tmp_path, capsys, monkeypatch):
    from experiments.vlm.costs.run_cost import cost_of

    out = tmp_path / "a"
    assert run(out, "--sweep", "training.seq_len=512,1024", "--index", "0") == 0
    capsys.readouterr()
    monkeypatch.setenv("DRY_RUN", "1")  # as --dry_run
    assert run(out, "--sweep", "training.seq_len=512,1024") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1][:4] == ["0", "seq_len=512", "finished", f"{3 * 2 * 512:,}"]
    assert lines[2][:4] == ["1", "seq_len=1024", "new", f"{3 * 2 * 1024:,}"]
    job = sweep.parse_over({}, [*JOB[2:], "--training.local_batch_size", "2"], sweep.CONFIG_CLASSES)
    assert cost_of(job, 1).tokens == 3 * 2 * job.training.seq_len
    assert float(lines[2][4]) > float(lines[1][4]) > 0 and float(lines[2][5]) > float(lines[1][5]) > 0
    assert not (out / "seq_len=1024").exists() and starts(out / "seq_len=512")[0]["DRY_RUN"] is None


def test_a_job_that_says_dry_run_starts_none(tmp_path, monkeypatch):
    shipped, job = REPOSITORY / "train_configs/vlm_debug.toml", tmp_path / "job.toml"
    job.write_text(shipped.read_text().replace("[job]", "[job]\ndry_run = true", 1))
    monkeypatch.setattr(sweep, "list_runs", lambda found, ranks: 7)
    asked = ["--job.config_file", str(job), "--sweep", RATES, "--out", str(tmp_path / "a")]
    assert sweep.main(asked) == 7 and sweep.main([*JOB, "--job.dry-run", *asked[2:]]) == 7
    assert sweep.main([*asked, "--dry_run", "--job.dry_run"]) == 7
    assert not (tmp_path / "a").exists()


def test_checkpoints_are_on_unless_somebody_says_no(tmp_path, capsys):
    assert run(tmp_path / "a", "--sweep", RATES, "--index", "0") == 0
    assert "checkpoint.enable is on" in capsys.readouterr().out
    assert run(tmp_path / "b", "--sweep", RATES, "--index", "0", "--checkpoint.no_enable") == 0
    assert "checkpoint.enable is on" not in capsys.readouterr().out
    asked = [tomllib.loads((tmp_path / out / "lr=1.0/job.toml").read_text()) for out in ("a", "b")]
    assert [job["checkpoint"]["enable"] for job in asked] == [True, False]


def test_runs_know_their_group_and_name(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_NAME", "of another")
    assert run(tmp_path / "a", "--sweep", RATES, "--index", "0") == 0
    (started,) = starts(tmp_path / "a" / "lr=1.0")
    assert (started["WANDB_RUN_GROUP"], started["WANDB_NAME"]) == ("a", "lr=1.0")


def test_a_file_with_a_sweep_is_one_for_run_train_and_for_no_single_run(tmp_path, monkeypatch):
    job = tmp_path / "sweep.toml"
    job.write_text(
        (REPOSITORY / "train_configs/vlm_debug.toml").read_text()
        + f'\n[sweep]\nout = "{tmp_path}/a"\nseeds = 2\n[sweep.grid]\noptimizer.lr = [1]\n'
    )
    monkeypatch.setenv("CONFIG_FILE", str(job))
    assert train_command.main(["--training.steps", "2"]) == 0
    assert [row["run"] for row in rows(tmp_path / "a")] == ["lr=1.0,seed=0", "lr=1.0,seed=1"]
    with pytest.raises(ConfigError, match=r"sweep.toml: \[sweep\] makes many jobs of this file"):
        parse(["--job.config_file", str(job)], sweep.CONFIG_CLASSES)


@pytest.mark.parametrize("options", [["--seeds", "2"], ["--sweep", RATES], ["--help", "sweep"]])
def test_run_train_hands_a_sweep_of_the_command_line_on(options, monkeypatch):
    asked: list[list[str]] = []
    monkeypatch.setattr(sweep, "main", lambda argv: asked.append(argv) or 7)
    assert train_command.main([*JOB, *options]) == 7
    assert asked == [[*JOB, *options]]


def test_help_of_a_sweep_lists_its_options(capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--help", "sweep"])
    assert {"--slurm_options", "--draw_seed"} <= set(capsys.readouterr().out.split())


def test_every_combination_of_the_shipped_sweep_can_run(tmp_path):
    """Writing an array checks all and starts none."""
    assert sweep.main(["--job.config_file", "sweeps/debug", "--out", str(tmp_path / "a"), "--slurm"]) == 0
    assert "#SBATCH --array=0-5%2\n" in (tmp_path / "a" / "sweep.sbatch").read_text()


@pytest.mark.slow
def test_a_sweep_that_is_cut_ends_as_an_array_of_slurm_that_is_not(tmp_path):
    """With the trainer itself, from a folder where no checkout is."""
    small = [
        *("--job.config_file", "vlm_debug", "--training.steps", "5", "--training.seq_len", "256"),
        *("--data.patches_per_row", "512", "--metrics.log_freq", "1", "--checkpoint.interval", "2"),
        *("--training.dataset", "cc12m", "--training.dataset_path", "embedded:sees/heldout"),
        *("--validation.freq", "5", "--validation.steps", "1", "--sweep", "optimizer.lr=1e-3,2e-3"),
    ]
    command = [sys.executable, str(REPOSITORY / "scripts" / "sweep.py"), *small, "--out"]
    process = subprocess.Popen([*command, "cut"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(losses(tmp_path / "cut" / "lr=0.001")) > 1)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert len(losses(tmp_path / "cut" / "lr=0.001")) < 5, "it was not cut"
    subprocess.run([*command, "cut"], cwd=tmp_path, check=True)

    subprocess.run([*command, "whole", "--slurm"], cwd=tmp_path, check=True)
    for index in ("0", "1"):
        variables = os.environ | {"SLURM_ARRAY_TASK_ID": index}
        subprocess.run(["bash", str(tmp_path / "whole" / "sweep.sbatch")], env=variables, check=True)
    subprocess.run([*command, "whole", "--report"], cwd=tmp_path, check=True)
    for run_name in ("lr=0.001", "lr=0.002"):
        assert losses(tmp_path / "cut" / run_name) == losses(tmp_path / "whole" / run_name)
        assert len(losses(tmp_path / "cut" / run_name)) == 5
    figures = [[row["last validate/loss"] for row in rows(tmp_path / out)] for out in ("cut", "whole")]
    assert figures[0] == figures[1] and all(figures[0])
    assert (tmp_path / "cut" / "sweep.png").stat().st_size > 0


def losses(folder: Path) -> dict[int, float]:
    file = folder / "metrics.jsonl"
    records = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {record["step"]: record["loss"] for record in records if "loss" in record}
