"""In continuous integration a test that is skipped for a reason nobody listed fails the session."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import conftest

ROOT = Path(conftest.__file__).parents[1]


@pytest.mark.parametrize(
    ("reason", "ci", "code"),
    [("nobody has time", "true", 1), ("nobody has time", "", 0), ("needs a GPU", "true", 0)],
)
def test_a_session_fails_on_a_skip_that_is_not_listed(tmp_path, monkeypatch, reason, ci, code):
    monkeypatch.setenv("CI", ci)
    shutil.copy(conftest.__file__, tmp_path)
    (tmp_path / "test_skipped.py").write_text(
        f"import pytest\n\n\ndef test_it():\n    pytest.skip({reason!r})\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code, done.stdout
    assert (f"does not list: {reason}" in done.stdout) == bool(code)


def test_every_listed_reason_is_one_that_a_test_gives():
    texts = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for reason in conftest.MAY_BE_SKIPPED:
        given = (
            reason
            if "import" not in reason
            else f"importorskip({reason.split()[-1].replace(chr(39), chr(34))})"
        )
        assert given in texts, reason
