"""What a whole environment is: the bounds of pyproject.toml, the tested versions, and that both are true."""

import ast
import re
import runpy
import sys
from importlib import metadata
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = runpy.run_path(str(REPOSITORY / "scripts" / "packages.py"))
OURS = ("torchtitan", "experiments", "tests", "benchmarks")
# Not imported by name: what torch imports, file systems that fsspec finds, plug-ins and tools.
NOT_IMPORTED = {
    "tensorboard",
    "setuptools",
    "s3fs",
    "gcsfs",
    "pytest-timeout",
    "pytest-xdist",
    "mypy",
    "ruff",
    "types-tqdm",
    "mkdocs-material",
}
# Never declared: pip would bring torchvision with them, and another torch (docs/lmms_eval.md).
UNDECLARED = {"lmms_eval", "torchvision"}
COMPARED = {"sklearn"}  # with which a benchmark compares where it is installed
IMPORT_NAMES = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "opencv-python-headless": "cv2",
    "huggingface-hub": "huggingface_hub",
}


@pytest.fixture
def installed(monkeypatch):
    """Stands for what is installed: name -> version."""
    versions: dict[str, str] = {}
    monkeypatch.setitem(PACKAGES["main"].__globals__, "installed", versions.get)
    return versions


@pytest.mark.parametrize(
    ("requirement", "wrong"),
    [
        ("thing>=2.11,<2.14", None),
        ("thing>=2.13.1", ">= 2.13.1"),
        ("thing<2.13", "< 2.13"),
        ("thing", None),
        ("no-such-thing-here", "not installed"),
    ],
)
def test_a_package_counts_only_within_its_bounds(requirement, wrong, installed):
    installed["thing"] = "2.13.0+cpu"
    told = PACKAGES["fault"](*PACKAGES["split"](requirement))
    assert told is None if wrong is None else wrong in told


def test_versions_that_were_not_tested_are_told_and_not_refused(installed, capsys):
    installed |= PACKAGES["tested"]()
    assert PACKAGES["main"]("missing") == 0 and capsys.readouterr().out == ""
    installed |= {"torch": "2.15.0+cpu", "tqdm": "5.0"}
    assert PACKAGES["main"]("missing") == 0
    told = capsys.readouterr().out
    assert re.search(r"torch 2\.15\.0 \(tested: 2\.13\.0\), tqdm 5\.0 \(tested: [\d.]+\)\n$", told)


def test_the_tested_versions_are_within_the_bounds_and_complete(installed):
    installed |= PACKAGES["tested"]()
    extras = ("dev", "docs", "s3", "gcs", "hf")
    assert [
        PACKAGES["fault"](PACKAGES["plain"](name), bounds)
        for name, bounds in PACKAGES["requirements"](extras)
    ] == [None] * len(PACKAGES["requirements"](extras))


def test_the_oldest_versions_are_the_lower_bounds(capsys):
    assert PACKAGES["main"]("oldest") == 0
    assert "torch==2.11" in capsys.readouterr().out.split()


def imported(*folders: str) -> set[str]:
    """Names of the foreign modules that the Python files below these folders import, importorskip counted."""
    found = set()
    for file in (file for folder in folders for file in (REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
                found.add(ast.literal_eval(node.args[0]))
    return {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names) - set(OURS)


def declared(*extras: str) -> set[str]:
    """Import names of the packages that pyproject.toml asks for."""
    names = {PACKAGES["plain"](name) for name, _ in PACKAGES["requirements"](extras)}
    return {IMPORT_NAMES.get(name, name) for name in names}


def test_the_package_declares_what_it_imports_and_nothing_else():
    used = imported("torchtitan", "experiments") - UNDECLARED
    assert (
        used - declared("ray", "hf", "fp8") == set()
    )  # what an extra brings is imported where it is asked for
    assert declared() - used <= NOT_IMPORTED


def test_the_extras_hold_what_tests_and_benchmarks_import_and_nothing_else():
    used = imported("tests", "benchmarks", "scripts", "torchtitan", "experiments")
    used -= UNDECLARED | COMPARED | {"packages"}
    assert used - declared("dev", "docs", "ray") == set()
    assert declared("dev", "docs", "ray", "s3", "gcs", "hf") - used <= NOT_IMPORTED


def test_the_version_is_told_by_package_and_metadata():
    from torchtitan import __version__

    assert metadata.version("torchtitan-vlm") == __version__
