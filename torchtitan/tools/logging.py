"""One logger for the whole project, on the standard library.

Information is printed as it is, by the ranks that LOG_RANK names ("0" or "0,1"); warnings come from every rank.
"""

import logging
import os
import sys

logger = logging.getLogger("torchtitan")


class _Line(logging.Formatter):
    """`step: 12 loss: ...`; warnings and errors say so; every rank but the first says which it is."""

    def __init__(self, rank: str):
        super().__init__()
        self.rank = "" if rank == "0" else f"[rank{rank}] "

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return f"{self.rank}{level}{record.message}"


def init_logger() -> None:
    """Print to stdout, however often it is called. `python -m experiments` calls it first."""
    rank = os.environ.get("RANK", "0")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Line(rank))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank in os.environ.get("LOG_RANK", "0").split(",") else logging.WARNING)
    logger.propagate = False
