"""A run that was killed, stopped or spoilt goes on as if nothing had happened."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import runs
from torchtitan.components.checkpoint_read import stored_sizes
from torchtitan.components.sinks import read_history


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run of eight steps that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    assert runs.train(folder) == 0, runs.log(folder)
    return folder


@pytest.fixture
def copy_of_straight(straight, tmp_path) -> Path:
    shutil.copytree(straight, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("--optimizer.name", "Muon"), marks=pytest.mark.slow),
        pytest.param(("--model.flavor", "small-llava"), marks=pytest.mark.slow),
    ],
    ids=["AdamW", "Muon", "LLaVA"],
)
def test_a_killed_run_repeats_the_uninterrupted_one_bit_for_bit(straight, tmp_path, options):
    whole = straight
    if options:
        whole = tmp_path / "whole"
        assert runs.train(whole, *options) == 0, runs.log(whole)
    killed = tmp_path / "killed"
    assert runs.train(killed, *options, KILL_AFTER="5") == -signal.SIGKILL
    assert sorted(runs.losses(killed)) == [1, 2, 3, 4, 5] and runs.checkpoints(killed) == ["step-2", "step-4"]
    taken = killed / "checkpoint" / "step-4" / "train_state.json"
    taken.write_text(json.dumps(json.loads(taken.read_text()) | {"wall_s": 1000.0}))
    assert runs.train(killed, *options) == 0, runs.log(killed)
    assert runs.losses(killed) == runs.losses(whole)
    assert [record["step"] for record in read_history(killed) if record["wall_s"] > 1000] == [5, 6, 7, 8]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_sets_the_exit_code_and_the_run_goes_on(straight, tmp_path, number):
    stop = f"{number.name.removeprefix('SIG')}_AFTER"
    assert runs.train(tmp_path, **{stop: "3"}) == 128 + number, runs.log(tmp_path)
    assert runs.checkpoints(tmp_path) == ["step-2", "step-3"]
    assert f"stopped by {number.name} after step 3; the same command goes on" in runs.log(tmp_path)
    assert runs.train(tmp_path) == 0, runs.log(tmp_path)
    assert runs.losses(tmp_path) == runs.losses(straight)


def test_a_run_whose_data_are_away_saves_and_ends_with_one_line_and_the_run_goes_on(straight, tmp_path):
    """Also where a thread of it reads for ever."""
    assert runs.train(tmp_path, AWAY_AFTER="3") == 2, runs.log(tmp_path)
    assert runs.checkpoints(tmp_path) == ["step-2", "step-3"]
    line = "error: a.tar: away; stopped after step 3; the same command goes on from its checkpoint"
    assert runs.log(tmp_path).splitlines()[-1] == line and "Traceback" not in runs.log(tmp_path)
    assert runs.train(tmp_path) == 0, runs.log(tmp_path)
    assert runs.losses(tmp_path) == runs.losses(straight)


def test_a_signal_while_the_data_are_away_saves_and_the_run_goes_on(straight, tmp_path):
    assert runs.train(tmp_path, TERM_AFTER="3", WAIT_AFTER="3") == 143, runs.log(tmp_path)
    assert runs.checkpoints(tmp_path) == ["step-2", "step-3"]
    assert "stopped by SIGTERM after step 3; the same command goes on" in runs.log(tmp_path)
    assert runs.train(tmp_path) == 0, runs.log(tmp_path)
    assert runs.losses(tmp_path) == runs.losses(straight)


def test_a_signal_while_the_last_step_is_evaluated_is_told_in_a_line(tmp_path):
    assert runs.train(tmp_path, "--training.steps", "2", WAIT_IN_THE_END="1") == 143, runs.log(tmp_path)
    line = "stopped by SIGTERM while the last step was evaluated; the same command goes on"
    assert line in runs.log(tmp_path).splitlines()[-1] and runs.checkpoints(tmp_path) == ["step-2"]


def test_a_stopped_run_without_checkpoints_says_so(tmp_path):
    assert runs.train(tmp_path, "--checkpoint.no_enable", TERM_AFTER="3") == 128 + signal.SIGTERM, runs.log(
        tmp_path
    )
    assert "stopped by SIGTERM after step 3; nothing was saved, since checkpoint.enable is off" in runs.log(
        tmp_path
    )


def test_a_second_interrupt_ends_the_run_at_once_with_one_line(tmp_path):
    assert runs.train(tmp_path, INT_TWICE_AFTER="3") == 128 + signal.SIGINT, runs.log(tmp_path)
    assert runs.checkpoints(tmp_path) == ["step-2"]
    last = runs.log(tmp_path).splitlines()[-1]
    assert last.startswith("interrupted at once") and "Traceback" not in runs.log(tmp_path)


def test_a_run_of_one_process_that_fails_speaks_of_no_ranks(tmp_path):
    assert runs.train(tmp_path, FAIL_AFTER="3") == 1
    assert "\nerror: failed in step 4\n" in runs.log(tmp_path) and "an accident" in runs.log(tmp_path)


@pytest.mark.slow
def test_a_signal_to_one_rank_of_two_saves_and_ends_both(tmp_path):
    command = [sys.executable, "-m", "torchtitan.launch", "--processes", "2", "tests.faults.accident"]
    environment = os.environ | {"TERM_AFTER": "3", "ACCIDENT_RANK": "1", "OMP_NUM_THREADS": "1"}
    with runs.options_of(tmp_path) as job:
        run = subprocess.run([*command, *job], env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 128 + signal.SIGTERM, run.stderr
    assert runs.checkpoints(tmp_path) == ["step-2", "step-3"]
    assert "stopped by SIGTERM after step 3; the same command goes on" in run.stdout


def test_the_next_step_is_told_after_the_checkpoint_is_complete(straight):
    lines = runs.log(straight).splitlines()
    place = {line.split(" loss")[0]: number for number, line in enumerate(lines)}
    complete = [
        number for number, line in enumerate(lines) if line.startswith("checkpoint of step 4 is complete")
    ]
    assert place["step: 4"] < complete[0] < place["step: 5"]


def test_checkpoints_in_the_background_give_the_same_run(straight, tmp_path):
    options = ("--checkpoint.async_mode", "async")
    assert runs.train(tmp_path, *options, KILL_AFTER="7") == -signal.SIGKILL
    assert runs.train(tmp_path, *options) == 0, runs.log(tmp_path)
    assert runs.losses(tmp_path) == runs.losses(straight)


def test_what_was_half_written_is_never_picked_up(copy_of_straight):
    folder = copy_of_straight / "checkpoint"
    (folder / "step-8").rename(folder / "step-8.incomplete")
    assert runs.train(copy_of_straight) == 0, runs.log(copy_of_straight)
    assert f"loaded {folder / 'step-6'}" in runs.log(copy_of_straight)
    assert not list(folder.glob("*.incomplete"))


def test_old_checkpoints_are_deleted(tmp_path):
    assert runs.train(tmp_path, "--checkpoint.keep_latest_k", "2") == 0, runs.log(tmp_path)
    assert runs.checkpoints(tmp_path) == ["step-6", "step-8"]


def test_a_finished_run_started_again_trains_nothing(copy_of_straight, straight):
    assert runs.train(copy_of_straight) == 0, runs.log(copy_of_straight)
    assert runs.losses(copy_of_straight) == runs.losses(straight)


def test_load_step_goes_back(copy_of_straight, straight):
    assert runs.train(copy_of_straight, "--checkpoint.load_step", "4") == 0, runs.log(copy_of_straight)
    assert f"loaded {copy_of_straight / 'checkpoint' / 'step-4'}" in runs.log(copy_of_straight)
    assert runs.losses(copy_of_straight) == runs.losses(straight)


def test_an_initial_checkpoint_gives_weights_alone(straight, tmp_path):
    initial = ("--checkpoint.initial_load_path", str(straight / "checkpoint" / "step-8"))
    assert runs.train(tmp_path, *initial) == 0, runs.log(tmp_path)
    found = runs.losses(tmp_path)
    assert sorted(found) == list(range(1, 9)), "steps and data start anew"
    assert found[1] != runs.losses(straight)[1]


def test_the_end_of_the_data_ends_the_run_with_a_checkpoint(tmp_path, straight):
    assert runs.train(tmp_path, "--data.epochs", "1", "--metrics.log_freq", "5") == 0, runs.log(tmp_path)
    assert runs.checkpoints(tmp_path) == ["step-2", "step-3"]
    assert sorted(runs.losses(tmp_path)) == [1, 3], "the last step is told, whatever the frequency"
    assert "\nthe data ended at step 3 of 8\n" in runs.log(tmp_path)
    report = json.loads((tmp_path / "data_report.json").read_text())
    assert report["samples"] == 6
    assert runs.log(tmp_path).count("\n1 of 6 samples were bad\n") == 1


def test_rejects_are_told_where_a_run_is_stopped_or_fails_too(tmp_path):
    assert runs.train(tmp_path / "stopped", TERM_AFTER="3") == 128 + signal.SIGTERM
    assert re.search(r"\n1 of \d samples were bad\nstopped by SIGTERM", runs.log(tmp_path / "stopped"))
    assert runs.train(tmp_path / "failed", FAIL_AFTER="3") == 1
    assert re.search(r"\n1 of \d samples were bad\n", runs.log(tmp_path / "failed"))


def test_epochs_are_told_and_kept_with_the_metrics(straight):
    assert re.findall("source drawn: epoch .*", runs.log(straight)) == [
        f"source drawn: epoch {n} began in step {3 * n - 2}" for n in (2, 3)
    ]
    values = [record["epochs/drawn"] for record in read_history(straight)]
    assert values == pytest.approx([step / 3 for step in range(1, 9)])


def rows_of_the_page() -> dict[str, str]:
    """Every name in the table of docs/figures.md, and what matches the names that a small run makes of it."""
    figures = "(loss|right|exact|thin|documents|tokens)"
    stands_for = {"SOURCE": "(drawn|other)", "blanked/NAME": f"blanked/{figures}(/(drawn|other))?"}
    stands_for |= {"shuffled/NAME": f"shuffled/{figures}(/(drawn|other))?", "/NAME": f"/{figures}"}
    rows = {}
    for line in Path("docs/figures.md").read_text().splitlines():
        for name in re.findall(r"`([^`]+)`", line.split("|")[1]) if line.startswith("| `") else ():
            rows[name] = name
            for words, pattern in stands_for.items():
                rows[name] = rows[name].replace(words, pattern)
    return rows


def test_the_last_line_with_controls_says_what_images_are_worth(tmp_path):
    assert (
        runs.train(
            tmp_path,
            "--training.steps",
            "1",
            "--validation.enable",
            "--validation.controls",
            "--metrics.save_plot",
        )
        == 0
    )
    *_, validation, drawn, other, curves, exact, right = runs.log(tmp_path).splitlines()
    shares = r": (\d+\.\d) %, images blanked: \d+\.\d %, images shuffled: \d+\.\d %"
    assert re.fullmatch("held-out documents exact" + shares, exact)
    assert re.fullmatch("held-out tokens right" + shares, right)[1] != "0.0"
    assert validation.startswith("validate step: 1 loss: ") and curves.startswith("curves: ")
    assert drawn.startswith("validate drawn step: 1 loss: ") and other.startswith("validate other step: 1 ")
    written = {name: value for record in read_history(tmp_path) for name, value in record.items()}
    rows = rows_of_the_page()
    assert [name for name in written if not any(re.fullmatch(row, name) for row in rows.values())] == []
    not_here = r"muon_lr.*|lr/GROUP|mfu|samples/SOURCE|rejected/REASON|validate/(exact|thin|TASK/METRIC)"
    missing = [name for name, row in rows.items() if not any(re.fullmatch(row, key) for key in written)]
    assert [name for name in missing if not re.fullmatch(not_here, name)] == []
    assert written["blanked/right"] == written["validate/right"] > 0  # what is drawn here knows no controls
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_dry_run_tells_sizes_and_writes_nothing(tmp_path):
    assert runs.train(tmp_path, "--job.dry_run") == 0, runs.log(tmp_path)
    told = (
        "pixel_values: uint8 [2, 96, 48]",
        "layout: one rank",
        "tokens of the run: 1,024, in 8 steps",
        "it fits this machine",
    )
    assert all(f"\n{line}" in runs.log(tmp_path) for line in told), runs.log(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_profiler_traces_are_written_when_asked_for(tmp_path):
    assert runs.train(tmp_path, "--profiling.enable_profiling", "--profiling.profile_freq", "4") == 0, (
        runs.log(tmp_path)
    )
    traces = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("profile_traces/*/*"))
    assert traces == ["profile_traces/step-4/rank0_trace.json", "profile_traces/step-8/rank0_trace.json"]


def test_the_global_batch_of_the_checkpoint_holds(copy_of_straight):
    record = copy_of_straight / "checkpoint" / "step-8" / "train_state.json"
    assert json.loads(record.read_text())["global_batch_size"] == 2
    assert runs.train(copy_of_straight, "--training.global_batch_size", "4") != 0
    assert "training.global_batch_size = 4" in runs.log(copy_of_straight)


def test_weights_alone_cannot_be_gone_on_from(tmp_path):
    assert runs.train(tmp_path, "--checkpoint.last_save_model_only") == 0, runs.log(tmp_path)
    names = stored_sizes(tmp_path / "checkpoint" / "step-8")
    assert names and all(name.startswith("model.") for name in names)
    assert runs.train(tmp_path, "--training.steps", "9") != 0
    assert "last_save_model_only" in runs.log(tmp_path)
