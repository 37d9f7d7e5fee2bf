"""The wheel works where no checkout is: command, jobs, tokenizer and embedded worlds, from any folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from torchtitan import __version__

REPOSITORY = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "torchtitan", "experiments", "train_configs", "assets")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools would leave build/ in the checkout, and take what is old there."""
    copy, built = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, copy / name)
    subprocess.run(
        [*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(built), str(copy)], check=True
    )
    [wheel] = built.iterdir()
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site-packages")
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(folder), str(wheel)], check=True)
    return folder


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The console command in `folder`, where no checkout is."""
    ours = ("NGPU", "CONFIG_FILE", "DRY_RUN", "WORLD_SIZE", "RANK")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"PYTHONPATH": str(installed)}
    command = [sys.executable, str(installed / "bin" / "torchtitan-vlm"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_data_types_and_a_description(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = Parser().parsestr(archive.read(f"torchtitan_vlm-{__version__}.dist-info/METADATA").decode())
    jobs = {
        f"experiments/shipped/{file.relative_to(REPOSITORY)}"
        for file in (REPOSITORY / "train_configs").rglob("*.toml")
    }
    tokenizer = {
        f"experiments/shipped/assets/tokenizer/{name}" for name in ("tokenizer.model", "special_tokens.json")
    }
    other = {"experiments/vlm/view/page.html", "experiments/py.typed", "torchtitan/py.typed"}
    assert jobs | tokenizer | other <= names
    assert {name.partition("/")[0] for name in names} == {
        "experiments",
        "torchtitan",
        f"torchtitan_vlm-{__version__}.dist-info",
    }
    assert about["Version"] == __version__ and "# torchtitan-vlm" in about.get_payload()


def test_the_command_tells_its_version(installed, tmp_path):
    assert run(installed, tmp_path, "--version").stdout == f"torchtitan-vlm {__version__}\n"


def test_the_installed_package_trains_on_what_it_brings(installed, tmp_path):
    """Job, tokenizer and world are those of the package, and nothing else is there."""
    small = [
        "--training.steps",
        "2",
        "--training.seq_len",
        "256",
        "--data.patches_per_row",
        "512",
        "--metrics.log_freq",
        "1",
    ]
    data = [
        "--training.dataset",
        "cc12m",
        "--training.dataset_path",
        "embedded:sees/heldout",
        "--data.cache_folder",
        "cache",
    ]
    done = run(
        installed, tmp_path, "train", *small, *data, "--validation.no_enable", "--validation.no_controls"
    )
    assert done.returncode == 0, done.stderr
    assert "step: 2 loss: " in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "outputs"]


@pytest.mark.slow
def test_a_shipped_job_is_found_by_its_name_alone(installed, tmp_path):
    done = run(installed, tmp_path, "estimate", "--job.config_file", "vlm_sees", "--rows", "0")
    assert done.returncode == 0, done.stderr
    assert "peak memory a rank" in done.stdout and "is not here" not in done.stdout
