"""A warm Python and a prepared folder, once for all files of a worker."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documented import scratch
from tests.documented.run import run
from tests.documented.warm_python import Server


@pytest.fixture(scope="session")
def python(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("warm"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def prepared(python, tmp_path_factory) -> Path:
    """A copy of the repository that pages find: see scratch.py."""
    folder = scratch.repository(tmp_path_factory.mktemp("prepared") / "torchtitan-vlm")
    done = run(scratch.BEFORE, python, folder)
    assert done.returncode == 0, done.stdout
    return folder
