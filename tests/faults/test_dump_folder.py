"""A dump folder that is used again: nothing is lost, mixed or trained in vain without a word."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from tests.distributed.test_hf_loading import save_whole
from tests.faults import runs
from torchtitan.components.sinks import read_history

CHECKPOINTS_OFF = "--checkpoint.no_enable"


def train(folder: Path, *options: str, **environment: str) -> int:
    return runs.train(
        folder, "--lr_scheduler.warmup_steps", "1", "--optimizer.lr", "0.0008", *options, **environment
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Four steps, checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    assert train(folder, "--training.steps", "4", "--metrics.enable_tensorboard") == 0, runs.log(folder)
    return folder


@pytest.fixture
def used(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "used")
    (tmp_path / "used" / "log.txt").unlink()
    return tmp_path / "used"


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its bytes and the time it was last written; the log of the test is not the run's."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def refused(folder: Path, *options: str) -> str:
    """The one line of a run that must not begin, nor change anything."""
    before = files(folder)
    assert train(folder, *options) == 2, runs.log(folder)
    assert files(folder) == before
    *_, last = runs.log(folder).splitlines()
    assert last.startswith("error: ") and "Traceback" not in runs.log(folder)
    return last.removeprefix("error: ")


def test_a_finished_run_says_so_and_changes_nothing(used):
    before = files(used)
    assert train(used, "--training.steps", "4") == 0, runs.log(used)
    assert runs.log(used).splitlines() == [
        f"{used} is finished: step 4 of 4; raise training.steps to go on, or give another job.dump_folder"
    ]
    assert files(used) == before


def test_a_finished_run_that_was_killed_before_its_last_evaluation_is_evaluated_again(tmp_path):
    """So killed, it looks as one that was not asked to be evaluated."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    asked = ["--training.steps", "2", "--validation.enable"]
    assert train(whole, *asked) == 0, runs.log(whole)
    assert train(cut, *asked, "--validation.no_enable") == 0, runs.log(cut)
    assert train(cut, *asked) == 0, runs.log(cut)
    held_out = [record for record in read_history(whole) if "validate/loss" in record]
    assert held_out and held_out == [record for record in read_history(cut) if "validate/loss" in record]
    assert runs.losses(whole) == runs.losses(cut)
    before = files(cut)
    assert train(cut, *asked) == 0 and files(cut) == before


def test_a_finished_run_is_not_taken_for_one_with_another_learning_rate(used):
    told = refused(used, "--training.steps", "4", "--optimizer.lr", "0.5")
    assert told == (
        f"{used} is finished (step 4 of 4), with other options: optimizer.lr was 0.0008 and is 0.5; "
        "give another job.dump_folder to train with them, or raise training.steps to go on with them"
    )


def test_fewer_steps_than_are_done_are_refused(used):
    assert f"training.steps = 3: {used} has a checkpoint of step 4" in refused(used, "--training.steps", "3")


def test_what_differs_on_resume_is_named_and_each_launch_keeps_its_configuration(used):
    options = ("--training.steps", "5", "--optimizer.lr", "0.5", "--metrics.enable_tensorboard")
    assert train(used, *options) == 0, runs.log(used)
    changed = "training.steps was 4 and is 5"
    assert (
        f"{used} goes on from step 4 with other options: optimizer.lr was 0.0008 and is 0.5; {changed}"
        in runs.log(used)
    )
    launches = {path.name: tomllib.loads(path.read_text()) for path in (used / "launches").iterdir()}
    assert {name: table["optimizer"]["lr"] for name, table in launches.items()} == {
        "1-from-step-0.toml": 0.0008,
        "2-from-step-4.toml": 0.5,
    }
    assert tomllib.loads((used / "config.toml").read_text()) == launches["2-from-step-4.toml"]


@pytest.mark.slow
def test_the_same_options_are_no_difference(tmp_path):
    assert train(tmp_path, TERM_AFTER="3") == 143, runs.log(tmp_path)
    for _ in range(2):  # the batch that the first launch settled on is none either
        assert train(tmp_path, TERM_AFTER="5") == 143, runs.log(tmp_path)
    assert "other options" not in runs.log(tmp_path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("--model.flavor", "tied"),
            "model.flavor = tied: {used}/checkpoint/step-4 was made with small-qwen3; keep it",
        ),
        (
            ("--optimizer.name", "Muon"),
            "optimizer.name = Muon: {used}/checkpoint/step-4 was made with AdamW; keep it",
        ),
        (
            ("--checkpoint.exclude_from_loading", "train_state"),
            "checkpoint.exclude_from_loading = train_state",
        ),
        (
            ("--checkpoint.no_enable",),
            "{used}/checkpoint has a checkpoint of step 4, and this run would begin at step 0",
        ),
        (
            ("--checkpoint.folder", "other"),
            "go on from it with --checkpoint.enable --checkpoint.folder checkpoint",
        ),
    ],
)
def test_what_makes_no_sense_in_this_folder_is_refused(used, options, told):
    assert told.format(used=used) in refused(used, "--training.steps", "9", *options)


def test_another_tokenizer_is_refused_and_one_that_moved_is_not(used, tmp_path):
    original = Path("assets/tokenizer")
    shutil.copytree(original, tmp_path / "moved")
    shutil.copytree(original, tmp_path / "other")
    with (tmp_path / "other" / "tokenizer.model").open("a") as file:
        file.write("\n")
    told = refused(used, "--training.steps", "5", "--model.tokenizer_path", str(tmp_path / "other"))
    assert "was made with assets/tokenizer" in told
    assert train(used, "--training.steps", "5", "--model.tokenizer_path", str(tmp_path / "moved")) == 0, (
        runs.log(used)
    )


def test_a_fresh_run_moves_the_files_of_the_one_before(tmp_path):
    options = (
        CHECKPOINTS_OFF,
        "--metrics.enable_tensorboard",
        "--metrics.save_plot",
        "--training.steps",
        "2",
    )
    (tmp_path / "mine.txt").write_text("not of a run")
    assert train(tmp_path, *options) == 0, runs.log(tmp_path)
    (tmp_path / "rejects").mkdir()
    (tmp_path / "rejects" / "0.jsonl").write_text("{}\n")
    first = {name: content for name, content in files(tmp_path).items() if name != "mine.txt"}
    for time in (1, 2):
        assert train(tmp_path, *options, "--optimizer.lr", f"0.{time}") == 0, runs.log(tmp_path)
        assert f"is now in {tmp_path}/previous/{time}: metrics.jsonl" in runs.log(tmp_path)
    assert files(tmp_path / "previous" / "1") == first
    assert tomllib.loads((tmp_path / "previous" / "2" / "config.toml").read_text())["optimizer"]["lr"] == 0.1
    assert [record["step"] for record in read_history(tmp_path)] == [1, 2]
    assert len(list((tmp_path / "tb").iterdir())) == 1 and not (tmp_path / "rejects").exists()
    assert (tmp_path / "mine.txt").exists()


def test_a_run_killed_before_its_first_checkpoint_begins_afresh(tmp_path):
    assert train(tmp_path, KILL_AFTER="1") < 0
    assert train(tmp_path) == 0, runs.log(tmp_path)
    assert [record["step"] for record in read_history(tmp_path / "previous" / "1")] == [1]
    assert sorted(runs.losses(tmp_path)) == list(range(1, 9))


def test_a_checkpoint_is_compared_with_the_launch_that_made_it(used):
    """Not with a later one, which saved nothing."""
    other = (
        "--training.steps",
        "6",
        "--optimizer.name",
        "Muon",
        "--checkpoint.exclude_from_loading",
        "optimizer",
    )
    assert train(used, *other, KILL_AFTER="4") < 0
    assert "optimizer.name was AdamW and is Muon" in runs.log(used)
    assert train(used, "--training.steps", "6") == 0, runs.log(used)
    assert runs.log(used).count("optimizer.name was") == 1


def test_going_back_puts_the_later_checkpoints_and_metrics_aside(used):
    step_4 = files(used / "checkpoint" / "step-4")
    assert train(used, "--training.steps", "4", "--checkpoint.load_step", "2", KILL_AFTER="3") < 0, runs.log(
        used
    )
    assert runs.checkpoints(used) == ["step-2"], "the next launch must not go on from the other branch"
    aside = used / "previous" / "1"
    assert files(aside / "checkpoint" / "step-4") == step_4
    assert [record["step"] for record in read_history(aside)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(tmp_path, "--metrics.enable_tensorboard", KILL_AFTER="5") < 0
    assert train(tmp_path, "--metrics.enable_tensorboard") == 0, runs.log(tmp_path)
    shown = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [event.step for event in shown.Scalars("loss")] == list(range(1, 9))


def test_weights_that_do_not_fit_the_model_leave_the_folder_as_it_is(tmp_path):
    """Files of others are compared with the model before an earlier run's files make room."""
    from safetensors.torch import load_file, save_file

    hf, folder = save_whole(tmp_path / "hf", "llama"), tmp_path / "used"
    assert train(folder, CHECKPOINTS_OFF, "--training.steps", "1") == 0, runs.log(folder)
    begin = [
        CHECKPOINTS_OFF,
        "--model.flavor",
        "",
        "--checkpoint.initial_load_in_hf",
        "--training.steps",
        "1",
    ]
    begin += ["--checkpoint.initial_load_path", str(hf)]
    file = next(hf.glob("model-00001*"))
    state = load_file(file)
    lost = next(iter(state))
    save_file({name: tensor for name, tensor in state.items() if name != lost}, file)
    names = json.loads((hf / "model.safetensors.index.json").read_text())
    del names["weight_map"][lost]
    (hf / "model.safetensors.index.json").write_text(json.dumps(names))
    assert f"tensor {lost} (" in refused(folder, *begin) and f"is not in {hf}" in runs.log(folder)
    assert train(folder, *begin, "--checkpoint.initial_load_allow", "missing") == 0, runs.log(folder)
    assert (folder / "previous" / "1").is_dir() and f"not in {hf}, so fresh: " in runs.log(folder)
