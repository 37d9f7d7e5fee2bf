"""Does a run whose linear maps compute in fp8 lose what it loses without?

    python -m benchmarks.float8 [--steps 500] [--ways plain seed rowwise rowwise_with_gw_hp] [--out FOLDER]
                                [--section.field VALUE ...]

The trainer's own command, once for each way, on the debug job or the one that is given; same seed, so same
first weights and batches, but for `seed`, which says how far two runs are apart that differ by chance alone.
Both towers compute in fp8; without a GPU it is emulated. Expected: a difference of the mean loss of the last
steps within that of two seeds.

Two things at the end: a table for people, one JSON line for others.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchtitan.components.run_record import read_run

ROOT = Path(__file__).parents[1]
JOB = "train_configs/vlm_debug.toml"
LAST = 50  # steps whose mean is compared
SHOWN = (1, 10, 50, 100, 200, 300, 400, 500)
FP8 = ["--float8.enable", "--float8.patterns", "encoder", "decoder"]
WAYS = {
    "plain": [],
    "seed": ["--debug.seed", "1"],
    "rowwise": [*FP8, "--float8.recipe_name", "rowwise"],
    "rowwise_with_gw_hp": [*FP8, "--float8.recipe_name", "rowwise_with_gw_hp"],
}


def train(way: str, options: argparse.Namespace, given: list[str], folder: Path) -> dict[str, Any]:
    """Losses of each step, held-out figures of the last, and the seconds of all."""
    argv = [
        *("--job.config_file", JOB, "--job.dump_folder", str(folder / way)),
        *("--training.steps", str(options.steps), "--metrics.log_freq", "1"),
        *("--validation.freq", str(max(1, options.steps // 2)), *given, *WAYS[way]),
    ]
    if "--float8.enable" in argv and not torch.cuda.is_available():
        argv.append("--float8.emulate")
    print(f"== {way}: {' '.join(argv)}", flush=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "experiments", *argv], cwd=ROOT, check=True)
    run = read_run(folder / way)
    held_out = {key: run.last(f"validate/{key}") for key in ("loss", "right")}
    losses = run.values("loss")[1]
    return {"way": way, "losses": losses.tolist(), "s": time.perf_counter() - began, **held_out}


def table(rows: list[dict[str, Any]]) -> str:
    """The first row as it is, and how far the others are from it."""
    first = np.array(rows[0]["losses"])
    steps = [step for step in SHOWN if step <= len(first)]
    heading = ["way", *(f"step {step}" for step in steps)]
    lines = [[*heading, f"last {LAST}", "difference", "held out", "right %", "s"]]
    for row in rows:
        losses = np.array(row["losses"])
        mean = losses[-LAST:].mean()
        shown = [f"{losses[step - 1]:.4f}" for step in steps]
        held_out = ["n/a" if row[key] is None else f"{row[key]:.4f}" for key in ("loss", "right")]
        apart = f"{100 * (mean / first[-LAST:].mean() - 1):+.2f} %"
        lines.append([row["way"], *shown, f"{mean:.4f}", apart, *held_out, f"{row['s']:.0f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, help="keeps the dump folders of the runs")
    options, given = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = [train(way, options, given, options.out or Path(scratch)) for way in options.ways]
    print(table(rows))
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    facts = {"benchmark": "float8", "hardware": hardware, "torch": torch.__version__}
    short = [{key: value for key, value in row.items() if key != "losses"} for row in rows]
    print(json.dumps(facts | {"steps": options.steps, "rows": short}))


if __name__ == "__main__":
    main()
