"""Everything that waits for a GPU, most wanted first, each with a time of its own.

    python -m benchmarks.on_gpu --out FOLDER [--minutes 13] [--only step-1B encoder] [--skip losses]
                                [--torchtitan-folder FOLDER]

What is still at work when its time is over is killed with all that it started (the trainer, asked to end,
would save first). Each whole output is in FOLDER/NAME.log; its last lines are printed at once, and a table at
the end. Exit code 1 where any failed or was killed.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
STEP = "benchmarks.train_step --steps 5 --kernels"
PEER = "--torchtitan-folder FOLDER"
LAST = 25  # lines of each output that are printed


class Work(NamedTuple):
    """A module with its arguments, and how long it may take. `PEER` among them: only where that folder is."""

    name: str
    seconds: int
    arguments: str


WORKS = [
    Work("step-3B", 150, f"{STEP} --flavor so400m-llama3.2-3B --slots 2 --accumulation 2 --ways compiled"),
    Work("encoder", 90, "benchmarks.encoder --seconds 1"),
    Work("step-1B", 180, f"{STEP} --flavor so400m-llama3.2-1B --slots 4 --accumulation 2"),
    Work("others-1B", 90, f"{STEP} --slots 1 --accumulation 2 --ways transformers"),
    Work("text-3B", 120, f"{STEP} --flavor so400m-llama3.2-3B --slots 2 --accumulation 2 --ways text"),
    Work("torchtitan-1B", 180, f"{STEP} --slots 2 --accumulation 2 --ways text torchtitan {PEER}"),
    Work("graphs", 90, "pytest tests/gpu/test_cuda_graph.py -x -q --tb=short"),
    Work("estimates", 90, "pytest tests/gpu/test_estimate.py -s -q --tb=short"),
    Work("model", 120, "pytest tests/gpu/test_model.py -q --tb=short"),
    Work("losses", 240, "pytest tests/gpu/test_losses.py -q --tb=short"),
    Work("fp8", 90, "pytest tests/gpu/test_float8.py -q --tb=short"),
    Work("throughput", 120, "pytest tests/gpu/test_throughput.py -s -q --tb=short"),
    Work("attention", 60, "benchmarks.attention --seconds 0.3"),
    Work("generation", 120, "benchmarks.generation --flavor so400m-llama3.2-1B"),
    Work("step-base-1B", 180, f"{STEP} --flavor base-llama3.2-1B --slots 4 --accumulation 2"),
    Work("fp8-step-3B", 150, f"{STEP} --flavor so400m-llama3.2-3B --slots 2 --ways compiled fp8"),
    Work("fp8-losses", 400, "benchmarks.float8 --training.mixed_precision_param bfloat16 --compile.enable"),
]


def run(work: Work, seconds: float, folder: Path) -> str:
    """How it ended, in a word."""
    log = folder / f"{work.name}.log"
    with log.open("w") as file:
        command = [sys.executable, "-u", "-m", *shlex.split(work.arguments)]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it left behind, too
        process.wait()
    print("\n".join(line[:220] for line in log.read_text(errors="replace").splitlines()[-LAST:]), flush=True)
    return "killed" if code is None else "passed" if code == 0 else f"exit {code}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [work.name for work in WORKS]
    parser.add_argument("--out", type=Path, required=True, help="folder of the logs")
    parser.add_argument("--minutes", type=float, default=60.0, help="of all; what is left then is not begun")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--skip", nargs="+", choices=names, default=[])
    parser.add_argument("--torchtitan-folder", type=Path, help="see benchmarks.train_step")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    until, ended = time.monotonic() + 60 * options.minutes, {}
    for work in WORKS:
        if work.name not in options.only or work.name in options.skip:
            continue
        if PEER in work.arguments:
            folder = options.torchtitan_folder
            if folder is None or not folder.is_dir():
                print(f"== {work.name}: skipped, --torchtitan-folder {folder} is not there", flush=True)
                continue
            there = PEER.replace("FOLDER", shlex.quote(str(folder.resolve())))
            work = work._replace(arguments=work.arguments.replace(PEER, there))
        began = time.monotonic()
        left = until - began
        print(f"== {work.name}: python -m {work.arguments}", flush=True)
        how = run(work, min(work.seconds, left), options.out) if left > 0 else "not begun"
        ended[work.name] = f"{how:12}{time.monotonic() - began:6.0f} s"
    print("\n".join(f"{name:14}{how}" for name, how in ended.items()))
    return int(any(not how.startswith("passed") for how in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
