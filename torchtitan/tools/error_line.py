"""How a user's error or interrupt is reported: one line on stderr; by the launcher where there is one, since
every rank may find the same.
"""

import os
import select
import signal
import sys
from pathlib import Path

from torchtitan.config.errors import UserError
from torchtitan.tools.disk import is_full, no_room

USER_ERROR, INTERRUPTED, UNREAD = 2, 128 + signal.SIGINT, 128 + signal.SIGPIPE  # exit codes
ERROR_FILE = "TORCHTITAN_ERROR_FILE"  # variable of a rank: where torchtitan/launch.py reads its line


def report_error(error: BaseException) -> None:
    """Report a user's error in its line."""
    report_line(f"error: {error}")


def reported(error: UserError | OSError) -> int:
    """The exit code, once the line of a user's error or of a full disk is out. Raises any other OSError."""
    if isinstance(error, OSError):
        if not is_full(error):
            raise error
        error = UserError(no_room(error))
    report_error(error)
    return USER_ERROR


def nobody_reads() -> bool:
    """Whether whoever read standard output (a pipe to `head`) has gone; then what is left goes nowhere."""
    output, asked = sys.stdout.fileno(), select.poll()
    asked.register(output, 0)
    gone = any(event & select.POLLERR for _, event in asked.poll(0))
    if gone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output)
        os.close(nowhere)
    return gone


def report_line(line: str) -> None:
    """Print a line to standard error, or hand it to the launcher where there is one."""
    if file := os.environ.get(ERROR_FILE):
        Path(file).write_text(line, encoding="utf-8", errors="backslashreplace")
    else:
        print(line, file=sys.stderr)
