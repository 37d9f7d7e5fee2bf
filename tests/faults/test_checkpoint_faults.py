"""A checkpoint that cannot be written or read is one line that says what to do; the one before it stays
whole.
"""

import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.faults import runs


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was killed after step 5: checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("stopped")
    assert runs.train(folder, KILL_AFTER="5") == -signal.SIGKILL, runs.log(folder)
    (folder / "log.txt").unlink()
    return folder


@pytest.fixture
def copied(stopped, tmp_path) -> Path:
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def error(folder: Path, *options: str, **environment: str) -> str:
    """The line of a run that fails: there is one, and no traceback."""
    assert runs.train(folder, *options, **environment) == 2, runs.log(folder)
    lines = [line for line in runs.log(folder).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in runs.log(folder), runs.log(folder)
    assert runs.log(folder).splitlines()[-1] == lines[0]
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize("mode", ["disabled", pytest.param("async", marks=pytest.mark.slow)])
def test_a_checkpoint_that_finds_no_room_is_one_line_and_the_run_goes_on_later(copied, mode):
    before = {path.name: path.read_bytes() for path in (copied / "checkpoint" / "step-4").iterdir()}
    largest = max(map(len, before.values()))
    told = error(copied, "--checkpoint.async_mode", mode, FILE_LIMIT=str(largest // 2))
    assert re.fullmatch(
        re.escape(f"checkpoint of step 6 was not written to {copied}/checkpoint ")
        + r"\(a file was cut short; \d+\.\d [GM]iB free\): make room, "
        "and the same command goes on from step 4",
        told,
    )
    assert runs.checkpoints(copied) == ["step-2", "step-4"], "and nothing half written takes room"
    assert {path.name: path.read_bytes() for path in (copied / "checkpoint" / "step-4").iterdir()} == before
    assert runs.train(copied) == 0, runs.log(copied)
    assert sorted(runs.losses(copied)) == list(range(1, 9))


def test_a_checkpoint_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "taken").write_text("a file")
    told = error(tmp_path, "--checkpoint.folder", "taken/below")
    assert told.startswith(f"checkpoint of step 2 was not written to {tmp_path}/taken/below (")
    assert "Not a directory" in told and told.endswith("make room, and start again: none is complete")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "no record": (lambda step: (step / "train_state.json").unlink(), "it has no train_state.json"),
    "half a record": (lambda step: truncate(step / "train_state.json"), "train_state.json: "),
    "no metadata": (lambda step: (step / ".metadata").unlink(), ".metadata: No such file"),
    "half the metadata": (lambda step: truncate(step / ".metadata"), ".metadata: "),
    "no tensors": (lambda step: (step / "__0_0.distcp").unlink(), "__0_0.distcp: No such file"),
    "half the tensors": (lambda step: truncate(step / "__0_0.distcp"), "(a file was cut short)"),
}


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        pytest.param(*damage, id=name, marks=[pytest.mark.slow] * (number > 0))
        for number, (name, damage) in enumerate(DAMAGES.items())
    ],
)
def test_a_damaged_checkpoint_is_named_with_the_way_to_go_on(copied, damage, why):
    damage(copied / "checkpoint" / "step-4")
    told = error(copied)
    assert told.startswith(f"checkpoint {copied}/checkpoint/step-4 cannot be read (") and why in told
    assert told.endswith("; go on from the one before with --checkpoint.load_step 2")
    assert runs.train(copied, "--checkpoint.load_step", "2") == 0, runs.log(copied)
    assert runs.train(copied) == 0, "the damaged one is out of the way"
    assert sorted(runs.losses(copied)) == list(range(1, 9))


def test_where_no_checkpoint_is_whole_another_folder_is_named(copied):
    shutil.rmtree(copied / "checkpoint" / "step-2")
    (copied / "checkpoint" / "step-4" / ".metadata").unlink()
    assert error(copied).endswith("; there is none before it: start anew in another job.dump_folder")


def test_a_damaged_initial_checkpoint_is_named(copied, tmp_path):
    (copied / "checkpoint" / "step-4" / ".metadata").unlink()
    told = error(tmp_path / "new", "--checkpoint.initial_load_path", str(copied / "checkpoint"))
    assert told.startswith(f"checkpoint {copied}/checkpoint/step-4 cannot be read (.metadata: No such file")
    assert told.endswith(f"; another one there: --checkpoint.initial_load_path {copied}/checkpoint/step-2")
