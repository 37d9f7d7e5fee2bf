"""One logger for the whole project, on the standard library. Lines carry the rank only where there are several."""

import logging
import os
import sys

logger = logging.getLogger("torchtitan")


def init_logger(level: int = logging.INFO) -> None:
    """Print from `level` on to stdout, once, however often it is called. `python -m experiments` calls it first."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    rank = f"[rank{os.environ.get('RANK', '0')}] " if several else ""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {rank}%(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
