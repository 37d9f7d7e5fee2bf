"""For all tests: figures that are saved, interrupts that arrive, and skips that continuous integration does
not allow.
"""

import gc
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from torchtitan.config import check as checks
from torchtitan.tools.logging import logger

# A job in the background has SIGINT ignored, as have all that it starts: then nobody here could be
# interrupted. What is started from a process with a handler gets the system's default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What this process holds is not collected in those that it forks: there the end of a process group waits for
# its threads, which were not forked, for ever.
os.register_at_fork(after_in_child=gc.freeze)

# Compiled kernels that two processes cached in one folder have given wrong gradients: each worker of
# pytest-xdist has a folder of its own.
if {"PYTEST_XDIST_WORKER", "TORCHINDUCTOR_CACHE_DIR"} <= os.environ.keys():
    os.environ["TORCHINDUCTOR_CACHE_DIR"] += "/" + os.environ["PYTEST_XDIST_WORKER"]

# Beginnings of the reasons for which a test may be skipped where CI is set, and why that cannot be mended
# there.
MAY_BE_SKIPPED = {
    "needs a GPU": "CI has none; run `pytest tests/gpu` where there is one",
    "could not import 'ray'": "an extra for preparing data on several machines, larger than all else",
    "could not import 'torchvision'": "its release pins a torch of its own, and pip would replace ours",
    "transformers before 5.24": "an environment of lower bounds has one, which masks an answer otherwise",
}
SKIPS = pytest.StashKey[list[str]]()


def as_it_was() -> Iterator[None]:
    """A test that starts a command in this process sets up the logger, which then tells caplog nothing any
    more; as do fixtures of a module.
    """
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


logger_of_a_module = pytest.fixture(as_it_was, autouse=True, scope="module")
logger_of_a_test = pytest.fixture(as_it_was, autouse=True)


@pytest.fixture
def repository_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is the repository; no GPU is seen, and every pipeline schedule works."""
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(checks, "visible_gpus", lambda: 0)
    monkeypatch.setattr(checks, "zero_bubble_works", lambda: True)


def skips_that_may_not_be(reasons: Iterable[str]) -> list[str]:
    """Those that MAY_BE_SKIPPED does not list."""
    return [reason for reason in reasons if not reason.startswith(tuple(MAY_BE_SKIPPED))]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where the environment has CI: what is skipped for ever is tested nowhere, so the session fails."""
    if not os.environ.get("CI"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("skipped", []) if reporter else []
    # (file, line, "Skipped: reason"); an expected failure is no skip.
    found = [
        report.longrepr[2].removeprefix("Skipped: ")
        for report in reports
        if isinstance(report.longrepr, tuple)
    ]
    session.config.stash[SKIPS] = skips_that_may_not_be(found)
    if session.config.stash[SKIPS] and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for reason in sorted(set(config.stash.get(SKIPS, []))):
        terminalreporter.write_line(
            f"skipped in CI, which tests/conftest.py does not list: {reason}", red=True
        )


@pytest.fixture
def figures(monkeypatch) -> list:
    """What matplotlib saves during the test: figures, whose artists can be asked what they show."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig

    def keep(figure, *arguments, **options):
        saved.append(figure)
        return save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def pytest_collection_finish() -> None:
    """What all tests share is not collected again by each run that a test makes."""
    gc.collect()
    gc.freeze()
