"""A wrong command, or a folder that cannot be written to, ends in one line and exit code 2, at once."""

import errno
import os
import re
import signal
import subprocess
import sys

import pytest

from experiments import commands
from experiments.__main__ import checked_job, main
from tests.unit.test_config_check import CP2, DATA, REPOSITORY, TP2
from torchtitan.config.errors import CheckpointError, ConfigError
from torchtitan.tools import disk
from torchtitan.tools.error_line import USER_ERROR

pytestmark = pytest.mark.usefixtures("repository_without_gpu")


def test_main_prints_one_line_and_gives_its_exit_code(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main([*DATA, "--training.steps", "0"]) == USER_ERROR
    assert capsys.readouterr().err == "error: training.steps = 0: must be >= 1\n"


@pytest.mark.parametrize(
    "given, told",
    [
        (
            ["compare", "--verbose", "a"],
            "Unrecognized options: --verbose, a; For full helptext, run torchtitan-vlm compare",
        ),
        (["inspect", "--out"], "out, without a value: expected a text"),
        (["prepare", "--out", "x"], "Missing from torchtitan-vlm prepare: --input STR"),
        (["download", "a/b", "--whet", "c"], "Unrecognized options: --whet, c; Perhaps you meant: --what"),
    ],
)
def test_what_a_command_does_not_take_is_told_in_a_line_without_a_frame(given, told, capsys):
    assert commands.main(given) == USER_ERROR
    said = capsys.readouterr().err
    assert said.startswith(f"error: {told}") and said.count("\n") == 1


def test_the_check_knows_the_number_of_processes():
    assert checked_job([*DATA, *CP2, *TP2], 4).parallelism.tensor_parallel_degree == 2
    with pytest.raises(ConfigError):
        checked_job([*DATA, *CP2, *TP2], 3)


@pytest.mark.parametrize("folder", ["pyproject.toml/below", "/proc/no/such"])
def test_a_dump_folder_that_cannot_be_written_to_is_told_before_torch_is_imported(
    folder, capsys, monkeypatch
):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setitem(sys.modules, "torchtitan.train", None)  # importing it would raise
    assert main([*DATA, "--job.dump_folder", folder]) == USER_ERROR
    told = capsys.readouterr().err
    assert (
        told.startswith(f"error: job.dump_folder = {folder}: cannot be written to (")
        and told.count("\n") == 1
    )


def test_a_folder_without_write_permission_is_told(tmp_path, monkeypatch):
    def refuse(**options):
        # root itself is never refused
        raise PermissionError(errno.EACCES, "Permission denied", str(options["dir"]))

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    with pytest.raises(
        ConfigError,
        match=f"job.dump_folder = {tmp_path}: cannot be written to .Permission denied.; give another",
    ):
        disk.require_writable(tmp_path, "job.dump_folder")


def test_a_full_disk_is_told_with_what_is_free(tmp_path):
    told = disk.describe(OSError(errno.ENOSPC, "No space left on device"), tmp_path / "not" / "there")
    assert re.fullmatch(r"No space left on device; \d+\.\d [MG]iB free", told)
    full = r"--out = .*out: not written \(No space left on device; \d+\.\d [MG]iB free\): make room"
    with pytest.raises(ConfigError, match=full), disk.whole_folder(tmp_path / "out") as half:
        (half / "begun").write_text("and no more")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not any(tmp_path.iterdir())
    with disk.whole_folder(tmp_path / "out") as half:
        (half / "done").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["done"]


def test_a_checkpoint_of_folders_that_the_disk_does_not_take_is_told_in_a_line(tmp_path, monkeypatch):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    from torchtitan.models.hf.checkpoint import write_checkpoint
    from torchtitan.models.hf.source import FolderSource

    def no_room(*_, **__):
        raise CheckpointException("writing", {0: (OSError(errno.ENOSPC, "No space left on device"), None)})

    monkeypatch.setattr(dcp, "save", no_room)
    with pytest.raises(CheckpointError, match=r"not written \(No space left on device; .*make room"):
        write_checkpoint(FolderSource([], []), {}, {}, tmp_path)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["--traning.steps", "5"], "--training.steps"),
        ([*DATA, "--training.steps", "0"], "training.steps"),
        ([*DATA, *TP2], "tensor_parallel"),
    ],
)
def test_a_wrong_command_ends_in_one_line_before_torch_is_imported(options, key):
    code = "import sys, experiments.__main__ as m; code = m.main(sys.argv[1:])\n"
    code += "print('torch' in sys.modules); sys.exit(code)"
    run = subprocess.run(
        [sys.executable, "-c", code, *options], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (USER_ERROR, "False\n") and run.stderr.startswith("error: ")
    assert key in run.stderr and run.stderr.count("\n") == 1


def test_a_reader_who_goes_away_ends_a_command_without_a_word(monkeypatch, capfd):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        monkeypatch.setattr("experiments.vlm.evaluate.tasks.__doc__", "task\n" * 10_000)
        assert commands.main(["evaluate", "--list"]) == 128 + signal.SIGPIPE
    assert capfd.readouterr().err == ""
