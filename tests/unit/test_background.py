"""Tests that interrupt what they start work in the background too, where shells ignore SIGINT."""

import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
HEEDS = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"


def test_what_a_test_starts_heeds_an_interrupt():
    assert subprocess.run([sys.executable, "-c", HEEDS], capture_output=True, text=True).stdout == "True\n"


def test_so_it_does_in_the_background():
    test = f"{Path(__file__).relative_to(REPOSITORY)}::{test_what_a_test_starts_heeds_an_interrupt.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, **ignore)
    assert run.returncode == 0 and "1 passed" in run.stdout, run.stdout
