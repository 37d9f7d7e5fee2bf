"""Train one job many times, each with other options: a grid, options that go together, draws, seeds.

    torchtitan-vlm sweep --job.config_file vlm.toml --sweep optimizer.lr=1e-4,3e-4 --seeds 2 --out sweeps/a
    torchtitan-vlm sweep --job.config_file sweep.toml --dry_run      a table [sweep] in the file says the same

Each run has a folder in --out, named by what differs. The same command goes on where it was stopped: what is
finished is left alone. It ends with a table, sweep.csv and sweep.png: see docs/sweeps.md.
"""

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from experiments.__main__ import CONFIG_CLASSES, EXPERIMENTS
from experiments.commands.job_options import number, with_variables
from torchtitan.components.saved_config import NEWEST
from torchtitan.config.devices import available_cores
from torchtitan.config.errors import ConfigError, require
from torchtitan.config.job import JobConfig
from torchtitan.config.parse import (
    SWEEP,
    config_file,
    given_options,
    option_types,
    parse_over,
    run_script,
    split_options,
    split_script,
    table_of,
)
from torchtitan.config.shipped import shipped_job
from torchtitan.sweep.members import Member, check_members, members
from torchtitan.sweep.options import Options, settings_of, space_of, with_settings
from torchtitan.sweep.places import Place, gpus_of, places
from torchtitan.sweep.results import columns, figure, read_results, table, write_csv
from torchtitan.sweep.run import Sweeper
from torchtitan.sweep.slurm import write_array
from torchtitan.sweep.space import Space, combinations
from torchtitan.sweep.status import JOB, LOG, require_same_job, status_of
from torchtitan.tools.disk import require_writable, write_whole
from torchtitan.tools.error_line import report_line
from torchtitan.tools.logging import init_logger, logger
from torchtitan.tools.signals import exit_code
from torchtitan.tools.wandb_login import require_wandb

MANY, HELP = ("--sweep", "--zip", "--random", "--seeds"), ["--help", SWEEP]  # what only a sweep is asked for
DRY_RUN = "--job.dry_run"
JOB_FILE = "sweep.toml"  # in --out: what an array reads


def main(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    init_logger()
    argv = ["--help"] if HELP in split_options(argv) else argv
    own, rest = split_script(with_variables(argv, os.environ), Options)
    tables = table_of(rest)
    swept = tables.pop(SWEEP, {})
    defaults = with_settings(settings_of(swept))
    options = run_script(Options, own, __doc__ or "", defaults, "torchtitan-vlm sweep")
    space = space_of(swept, options)
    if options.dry_run:
        rest.append(DRY_RUN)
    saved_by_us = save_runs(tables, rest)
    found, out = find_members(tables, rest, space, options)
    if options.report:
        return show(found, space, out, options.metric)
    where = find_places(options)
    ranks = int(where[0]["NGPU"])
    check_members(found, lambda job: EXPERIMENTS[job.model.name].check(job, ranks))
    for member in found:
        require_same_job(member, changes_nothing)
    if options.dry_run:
        return list_runs(found, ranks)
    require_writable(out, "--out")
    if any(member.job.metrics.enable_wandb for member in found):
        require_wandb()
    if saved_by_us:
        logger.info("checkpoint.enable is on, so that what is cut goes on (--checkpoint.no_enable: off)")
    if options.slurm:
        return write_script([*rest, *own], found, out, options)
    return train(found, space, out, options, where)


def asks_for_many(options: Sequence[str]) -> bool:
    """Whether these are the options of a sweep: of the command, or a file with a table [sweep]."""
    groups = split_options(options)
    with contextlib.suppress(ConfigError):  # the trainer says what is wrong with the file
        return any(group[0] in MANY for group in groups) or HELP in groups or SWEEP in table_of(options)
    return False


def save_runs(tables: dict[str, Any], argv: Sequence[str]) -> bool:
    """Turn checkpoints on where neither the file nor the command line mentions them. True: they were off."""
    section = tables.setdefault("checkpoint", {})
    given = {token.partition("=")[0].replace("-", "_") for token in argv}  # --checkpoint.no-enable as well
    said = {"__checkpoint.enable", "__checkpoint.no_enable"} & given
    if said or not isinstance(section, dict) or "enable" in section:
        return False
    section["enable"] = True
    return True


def find_members(
    tables: dict[str, Any], rest: Sequence[str], space: Space, options: Options
) -> tuple[list[Member], Path]:
    """The runs, or the one that --index names, and the folder that holds theirs. Raises ConfigError."""

    def parse(more: Sequence[str]) -> JobConfig:
        return parse_over(tables, [*rest, *more], CONFIG_CLASSES)

    base = parse([])
    options.dry_run = base.job.dry_run  # a variable or the file may have asked for it
    out = Path(options.out or base.job.dump_folder)
    a_run = f"{out} is the folder of a run itself; give another --out"
    require(not (out / NEWEST).exists(), a_run)
    known = option_types(type(base), base)
    swept = {*space.grid, *space.random, *chain(*space.zipped)}
    for key in swept & given_options(split_options(rest), known):
        raise ConfigError(f"--{key}: is swept too; keep one of the two")
    assignments = combinations(space, known, base.debug.seed)
    last = len(assignments) - 1
    require(options.index <= last, f"--index = {options.index}: the runs are 0 to {last}")
    return members(assignments, out, parse, options.index), out


def changes_nothing(option: str) -> bool:
    """Whether a run may go on with another value: of options that say how, not what, data are read."""
    from experiments.vlm.data.setup import FREE_OF_DATA  # imports torch

    section, _, name = option.partition(".")
    return section == "data" and name in FREE_OF_DATA


def find_places(options: Options) -> list[Place]:
    """Where runs start on this machine. Raises ConfigError."""
    machines = number(os.environ, "NNODES", 1)
    require(machines == 1, f"NNODES = {machines}: a sweep starts its runs on one machine; see --slurm")
    at_once = 1 if options.index >= 0 or options.slurm else options.at_once
    threads = os.environ.get("OMP_NUM_THREADS", "")
    gpus = [] if options.slurm else gpus_of(os.environ)  # the array runs elsewhere
    return places(at_once, number(os.environ, "NGPU", 0), gpus, available_cores(), threads)


def list_runs(found: Sequence[Member], ranks: int) -> int:
    """What each run is, what has become of it, and what it costs."""
    from experiments.vlm.costs.run_cost import cost_of  # imports torch

    rows = [["", "run", "state", "tokens", "GiB a rank", "FLOPs"]]
    costs = [cost_of(member.job, ranks) for member in found]
    for member, cost in zip(found, costs, strict=True):
        state = str(status_of(member))
        row = [str(member.index), member.name, state, f"{cost.tokens:,}", f"{cost.peak_gib:.2f}"]
        rows.append([*row, f"{cost.flops:.2e}"])
    print(columns(rows))
    print(
        f"{len(found)} runs: {sum(cost.tokens for cost in costs):,} tokens, "
        f"{sum(cost.flops for cost in costs):.2e} FLOPs of full slots, "
        f"at most {max(cost.peak_gib for cost in costs):.2f} GiB of tensors a rank ({ranks} of a run)"
    )
    return 0


def write_script(given: Sequence[str], found: Sequence[Member], out: Path, options: Options) -> int:
    """Write a script for sbatch, with the runs that are not finished. `given`: all options."""
    left = [member.index for member in found if status_of(member).state != "finished"]
    if not left:
        print(f"all {len(found)} runs are finished: there is nothing to write; --report shows them")
        return 0
    # A copy: an edit of the file while the array waits does not change which run an index means.
    file = out / JOB_FILE
    write_whole(file, shipped_job(config_file(given) or "").read_text(encoding="utf-8"))
    given = [*(token for token in given if token != "--slurm"), "--job.config_file", str(file)]
    lines = [line if line.startswith("-") else f"--{line}" for line in options.slurm_options]
    command = ["experiments.commands", "sweep", *given, "--out", str(out)]
    script = write_array(out, command, left, options.at_once, lines, os.environ)
    print(f"{script}: {len(left)} runs; start them with\n  sbatch {shlex.quote(str(script))}")
    print("when they have ended, the same command with --report in place of --slurm shows table and picture")
    return 0


def train(found: Sequence[Member], space: Space, out: Path, options: Options, where: Sequence[Place]) -> int:
    """Start what is not finished, then show what came of all. Returns the exit code."""
    there = [status_of(member).state for member in found]
    logger.info(f"{out}: {len(found)} runs, {there.count('finished')} of them finished, {len(where)} at once")
    left = [member for member, state in zip(found, there, strict=True) if state != "finished"]
    stopped_by = Sweeper(left, where, train_command, group=out.resolve().name).run()
    statuses = {member.name: status_of(member) for member in found}
    missing = {name: status for name, status in statuses.items() if status.state != "finished"}
    if stopped_by is not None:
        done = f"{len(found) - len(missing)} of {len(found)} runs are finished"
        report_line(f"stopped by {stopped_by.name}: {done}; the same command goes on")
        return exit_code(stopped_by)
    if options.index < 0:
        show(found, space, out, options.metric)
    for name, status in missing.items():
        report_line(f"{name}: {status}; see {out / name / LOG}")
    return 1 if missing else 0


def show(found: Sequence[Member], space: Space, out: Path, metric: str) -> int:
    """Print the table, and write sweep.csv and the picture, of what there is."""
    from torchtitan.sweep.picture import draw

    results = read_results(found, space.axes, metric)
    if all(not run.record.history for run in results.runs):
        print(f"{out}: no run has a figure yet")
        return 0
    files = write_csv(results, out), draw(results, out)
    print(table(results))
    print(f"\nwritten: {', '.join(map(str, files))}")
    if results.best is not None:
        best = results.best
        best_value = f"{results.metric} {figure(best.record.last(results.metric))}"
        print(f"best: {best.member.name} ({best_value}); its job: {best.member.folder / JOB}")
    return 0


def train_command(job: Path) -> list[str]:
    """The command that trains the job of a file."""
    return [sys.executable, "-m", "experiments.commands", "train", "--job.config_file", str(job)]
