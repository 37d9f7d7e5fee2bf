"""How a user's error or interrupt is reported: one line on stderr; by the launcher where there is one, since
every
rank may find the same."""

import os
import signal
import sys
from pathlib import Path

USER_ERROR, INTERRUPTED = 2, 128 + signal.SIGINT  # exit codes
ERROR_FILE = "TORCHTITAN_ERROR_FILE"  # variable of a rank: where torchtitan/launch.py reads its line


def report_error(error: BaseException) -> None:
    """Report a user's error in its line."""
    report_line(f"error: {error}")


def report_line(line: str) -> None:
    """Print a line to standard error, or hand it to the launcher where there is one."""
    if file := os.environ.get(ERROR_FILE):
        Path(file).write_text(line, encoding="utf-8")
    else:
        print(line, file=sys.stderr)
