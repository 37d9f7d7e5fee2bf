"""The commands of the pages that train, the notebook, and the script for Slurm: half of the time of all."""

import base64
import io
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.documented.pages import PAGES, REPOSITORY, TRAINING
from tests.documented.run import run, run_page


def test_the_pages_that_train_are_there():
    assert {page.name for page in PAGES} >= TRAINING


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name in TRAINING], ids=lambda page: page.name
)
def test_the_commands_of_a_page_work(page, prepared, python, tmp_path):
    run_page(page, prepared, python, tmp_path / "torchtitan-vlm")


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
