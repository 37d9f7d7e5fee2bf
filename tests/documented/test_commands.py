"""Every command of the pages does what it says, or at least knows the options that it is given."""

import base64
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.documented import scratch
from tests.documented.pages import PAGES, REASONS, REPOSITORY, Block, blocks, hidden, spans
from tests.documented.warm_python import Server

OURS = ("VENV", "NGPU", "CONFIG_FILE", "DRY_RUN", "NNODES", "NODE_RANK", "MASTER_ADDR", "WORLD_SIZE", "RANK")


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("warm"))
    yield server
    server.close()


def run(block: Block | str, python: Server, folder: Path) -> subprocess.CompletedProcess:
    """In bash, in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    environment |= {"PATH": f"{python.bin}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    code = block
    if isinstance(block, Block):
        code = block.code
        environment |= {"LOOK_ONLY": "1"} if block.reason else {}
    command = ["bash", "-euo", "pipefail", "-c", str(code)]
    return subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def prepared(python, tmp_path_factory) -> Path:
    """A copy of the repository that pages find: see scratch.py."""
    folder = scratch.repository(tmp_path_factory.mktemp("prepared") / "torchtitan-vlm")
    done = run(scratch.BEFORE, python, folder)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_work(page, prepared, python, tmp_path):
    folder = tmp_path / "torchtitan-vlm"
    shutil.copytree(prepared, folder, symlinks=True)
    for block in [*blocks(page), *spans(page)]:
        done = run(block, python, folder)
        assert done.returncode == 0, f"{page.name}:{block.line}\n{block.code}\n{done.stdout[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_of_a_page_is_left_out(page):
    assert hidden(page) == []
    assert {block.reason for block in blocks(page)} <= {"", *REASONS}


@pytest.mark.parametrize(
    "command",
    [
        "torchtitan-vlm generate --no_such_option 3",
        "torchtitan-vlm prepare --input a.tsv --no_such_option 3",
        "./run_train.sh --no_such.option 3",
        "NGPU=2 ./run_train.sh --training.steps three",
        "python scripts/draw_world.py --no_such_option 3",
        "python -m no_such_module",
        "pip install '.[no_such_extra]'",
        "no_such_program",
    ],
)
def test_what_is_only_looked_at_fails_where_it_is_wrong(command, prepared, python):
    assert run(Block(Path(), 0, command, "a GPU"), python, prepared).returncode != 0


def test_commands_that_nobody_would_run_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Do\n\n    torchtitan-vlm inspect\n\n```text\n./run_train.sh\n```\n```bash\n./run_tests.sh\n```\n"
    )
    assert hidden(page) == ["    torchtitan-vlm inspect", "./run_train.sh"]


def test_the_notebook_runs_and_shows_a_packed_batch(prepared, python, tmp_path):
    """Now, and as it is kept with the repository."""
    folder = tmp_path / "torchtitan-vlm"
    shutil.copytree(prepared, folder, symlinks=True)
    command = f"python -m tests.documented.notebook docs/notebook.ipynb {tmp_path}/ran.ipynb"
    done = run(command, python, folder)
    assert done.returncode == 0, done.stdout
    for file in (tmp_path / "ran.ipynb", REPOSITORY / "docs" / "notebook.ipynb"):
        (picture,) = pictures(json.loads(file.read_text()))
        assert Image.open(io.BytesIO(picture)).size == (1200, 560)


def pictures(notebook: dict) -> list[bytes]:
    """What its cells show, as PNG."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    shown = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", ())]
    return [base64.b64decode(data) for data in shown]


def test_the_slurm_script_trains_on_the_machines_that_it_was_given(prepared, python, tmp_path):
    """Two machines, played by programs with the names of Slurm's; each has one process."""
    folder, stand_ins = tmp_path / "torchtitan-vlm", tmp_path / "bin"
    shutil.copytree(prepared, folder, symlinks=True)
    write_programs(stand_ins, scontrol="printf '127.0.0.1\\nsecond\\n'", srun=SRUN)
    options = "--training.local_batch_size 1 --validation.no_enable --validation.no_controls"
    slurm = "SLURM_JOB_NUM_NODES=2 SLURM_JOB_NODELIST=node[1-2] SLURM_JOB_ID=9641 NGPU=1"
    done = run(
        f"export PATH={stand_ins}:$PATH {slurm}; bash scripts/several_machines.slurm {options}",
        python,
        folder,
    )
    assert done.returncode == 0, done.stdout
    assert "step: 2 loss: " in done.stdout
    lines = (folder / "outputs/vlm_debug/launches/1-from-step-0.toml").read_text()
    assert "local_batch_size = 1" in lines and "global_batch_size = 2" in lines


# As Slurm starts a task on each node; options of its own come first.
SRUN = """
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=1 "$@" > second.txt & SLURM_NODEID=0 "$@" && wait $!
"""


def write_programs(folder: Path, **programs: str) -> None:
    folder.mkdir()
    for name, code in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{code}\n")
        (folder / name).chmod(0o755)
