"""A different distribution bears our import name: where it would be taken for ours, one line says so."""

import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def start_beside(other: Path, first: str) -> subprocess.CompletedProcess:
    """Start with the packages of the folder `other` before or after ours."""
    paths = [str(other), str(REPOSITORY)] if first == "other" else [str(REPOSITORY), str(other)]
    code = f"import sys; sys.path[:0] = {paths}\n"
    code += "from experiments.commands import main; sys.exit(main(['--version']))"
    return subprocess.run([sys.executable, "-c", code], cwd=other, capture_output=True, text=True)


def install_other(folder: Path) -> None:
    """What pip leaves of the distribution `torchtitan`, a package that cannot even be imported."""
    (folder / "torchtitan").mkdir()
    (folder / "torchtitan" / "__init__.py").write_text("raise ImportError('not even importable')")
    (folder / "torchtitan-0.2.0.dist-info").mkdir()
    (folder / "torchtitan-0.2.0.dist-info" / "METADATA").write_text("Name: torchtitan\nVersion: 0.2.0\n")
    (folder / "torchtitan-0.2.0.dist-info" / "RECORD").write_text("torchtitan/__init__.py,,\n")


def test_the_other_torchtitan_is_refused(tmp_path):
    """A different distribution has the same import name: here one that comes first on the path."""
    install_other(tmp_path)
    run = start_beside(tmp_path, first="other")
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert run.stderr.startswith("error: ") and "is not the one of torchtitan-vlm" in run.stderr


def test_the_other_torchtitan_does_no_harm_where_ours_comes_first(tmp_path):
    install_other(tmp_path)
    assert start_beside(tmp_path, first="ours").returncode == 0


def test_the_other_torchtitan_is_refused_where_it_shares_our_folder(tmp_path):
    """Both installed: whichever came last has written over files of the other."""
    install_other(tmp_path)
    for package in ("torchtitan", "experiments"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / package, tmp_path / package, dirs_exist_ok=True, ignore=ignored)
    run = start_beside(tmp_path, first="other")
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert "pip uninstall torchtitan torchtitan-vlm" in run.stderr
