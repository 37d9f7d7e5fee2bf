"""One logger for the whole project, on the standard library.

Information is printed as it is, by the ranks that LOG_RANK names ("0" or "0,1"); warnings come from every
rank.
"""

import logging
import os
import sys
from typing import TextIO

logger = logging.getLogger("torchtitan")


class _Line(logging.Formatter):
    """`step: 12 loss: ...`; warnings and errors say so; every rank but the first says which it is."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = "" if rank == 0 else f"[rank{rank}] "

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return f"{self.rank}{level}{record.message}"


def log_ranks(world_size: int) -> set[int]:
    """Ranks that print: LOG_RANK, numbers with commas between; rank 0 where it names none of this run."""
    named = {int(rank) for rank in os.environ.get("LOG_RANK", "0").split(",") if rank.strip().isdigit()}
    return {rank for rank in named if rank < world_size} or {0}


def warn_once(message: str) -> None:
    """Log a warning that every rank has alike, on those that LOG_RANK names alone."""
    if logger.isEnabledFor(logging.INFO):
        logger.warning(message)


def init_logger(stream: TextIO | None = None) -> None:
    """Print to `stream` (None: stdout), however often it is called. Commands call it first."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(_Line(rank))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank in log_ranks(world_size) else logging.WARNING)
    logger.propagate = False
