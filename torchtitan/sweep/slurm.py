"""A sweep as an array of Slurm: each member of the array starts one run by its index. Imports no torch."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torchtitan
from torchtitan.tools.disk import write_whole

SCRIPT, LOGS = "sweep.sbatch", "slurm"
KEPT = ("NGPU", "OMP_NUM_THREADS", "WANDB_PROJECT", "WANDB_MODE", "WANDB_RUN_GROUP")
BEFORE_THE_END_S = 120  # SIGTERM comes so long before the time is up, so that the run saves and stops


def write_array(
    out: Path,
    command: Sequence[str],
    indices: Sequence[int],
    at_once: int,
    lines: Sequence[str],
    variables: Mapping[str, str],
) -> Path:
    """`command`: the sweep, as `python -m` runs it, without --slurm; `lines`: more of #SBATCH.

    Returns the path of the script.
    """
    (out / LOGS).mkdir(parents=True, exist_ok=True)
    throttle = f"%{at_once}" if at_once else ""
    asked = [
        f"--job-name={out.resolve().name}",
        f"--array={ranges(indices)}{throttle}",
        "--nodes=1",
        "--ntasks=1",
        f"--output={(out / LOGS).resolve() / '%a.log'}",
        "--open-mode=append",
        f"--signal=B:TERM@{BEFORE_THE_END_S}",
        *lines,
    ]
    source = Path(torchtitan.__file__).parents[1]
    exports = {name: variables[name] for name in KEPT if variables.get(name)}
    body = [
        f"cd {shlex.quote(str(Path.cwd()))}",
        f"export PYTHONPATH={shlex.quote(str(source))}${{PYTHONPATH:+:$PYTHONPATH}}",
        *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        # In place of the shell, so that signals reach it.
        f'exec {shlex.join([sys.executable, "-m", *command])} --index "$SLURM_ARRAY_TASK_ID"',
    ]
    script = out / SCRIPT
    # sbatch splits a line at spaces, as a shell does.
    header = ["#!/usr/bin/env bash", *(f"#SBATCH {shlex.quote(line)}" for line in asked)]
    write_whole(script, "\n".join([*header, "", *body]) + "\n")
    script.chmod(0o755)
    return script


def ranges(numbers: Sequence[int]) -> str:
    """0-3,7,9-10"""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)
