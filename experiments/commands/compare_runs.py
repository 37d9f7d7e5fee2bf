"""Compare runs: options that differ, all curves, what came of each source.

    torchtitan-vlm compare outputs/a outputs/b --out compare.html
    torchtitan-vlm compare sweeps/a                                  all runs of a sweep

Takes dump folders, or folders of them, and makes one HTML page that loads nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from torchtitan.compare.page import compare_page
from torchtitan.compare.runs import differing, read_runs
from torchtitan.config.errors import require
from torchtitan.config.parse import run_tyro
from torchtitan.tools.disk import require_writable, write_whole

OCCUPANCY = ("patches", "tokens")  # what a batch of vlm says of how full it is


@dataclass
class Options:
    """Which runs, and where the page goes."""

    runs: tyro.conf.Positional[list[str]]  # dump folders, or folders of them such as that of a sweep
    out: str = "compare.html"  # the page


def main(argv: Sequence[str]) -> int:
    """The command. Raises ConfigError."""
    options = run_tyro(Options, argv, None, "torchtitan-vlm compare", __doc__)
    require(bool(options.runs), "which runs? Give their dump folders")
    runs, out = read_runs(options.runs), Path(options.out)
    require(out.suffix.lower() in (".html", ".htm"), f"--out = {out}: must end in .html")
    require_writable(out.parent, "--out")
    write_whole(out, compare_page(runs, OCCUPANCY))
    found = differing([run.record for run in runs])
    print(f"{len(runs)} runs, options that differ: {', '.join(found) or 'none'}")
    print(f"written: {out}")
    return 0
