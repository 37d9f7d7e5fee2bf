"""Which slots, L, chunk and recomputation train a job fastest on this machine? Short runs of it show.

    torchtitan-vlm tune --job.config_file vlm_debug --minutes 20
    NGPU=8 torchtitan-vlm tune --job.config_file job.toml --out tune

The job as it is runs first, on its own data and with all GPUs (or NGPU of them); then what may gain most,
each for about ten steps. What is learnt stays the same: S, the model, the slots of an optimizer step. Fastest
is what does most useful FLOPs a second, padding and recomputation left out. What the planner finds too large
is not run. It ends with a table, the lines for the TOML, and the whole job in best.toml; the same command
goes on where it was stopped. --job.dry_run lists what would be tried around the job, and runs nothing.
"""

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from experiments.commands.advise_packing import PROCESSES, read_data, the_job_itself
from experiments.commands.job_options import number, parse_command, with_variables
from experiments.commands.sweep import train_command
from experiments.vlm.check import check_vlm
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.costs.packing_advice import Deadline, Trials, search
from experiments.vlm.costs.tuning import Planner, Space, promising, with_settings
from experiments.vlm.data.batch_metrics import BATCH_METRICS
from experiments.vlm.model_config import image_plan
from experiments.vlm.weights.embedding_rows import open_tokenizer, rows_of
from torchtitan.components.tokenizer import Tokenizer
from torchtitan.config.check import check_options
from torchtitan.config.devices import available_cores
from torchtitan.config.errors import UserError, require
from torchtitan.config.parse import to_toml
from torchtitan.sweep.members import Member
from torchtitan.sweep.places import Place, gpus_of, places
from torchtitan.sweep.results import columns
from torchtitan.sweep.run import Sweeper
from torchtitan.tools.disk import require_writable, write_whole
from torchtitan.tools.error_line import report_line
from torchtitan.tools.hardware import memory_gib, peak_flops
from torchtitan.tools.lock import locked
from torchtitan.tools.logging import init_logger, logger
from torchtitan.tools.signals import Ended, resumable
from torchtitan.tune.report import Report, require_same_machine, table, toml_lines, verdict
from torchtitan.tune.tuner import Tuner

BEST, LENGTHS = "best.toml", "lengths.json"
UNSEEN_GIB, SHARE = 2.0, 0.95  # of a device: what the planner does not see, and how far it is trusted
ADVICE_S, ADVICE_SHARE, SAMPLES = 20.0, 0.1, 5000  # the adviser's: seconds, share of the time, documents
# A record takes about so long on a GPU: between two the host may run ahead, as it does in training.
RECORD_S, USUAL_MFU, USUAL_FLOPS, MOST_STEPS = 0.5, 0.4, 100e12, 20


@dataclass
class Options:
    """How long it may take, and how well each candidate is measured."""

    minutes: float = 20.0  # for all together; then the best so far is shown
    # folder of the candidates and of what is written; empty: tune, in job.dump_folder
    out: str = ""
    # that count of each candidate: a record is a step, or several where steps are short
    records: int = 8
    memory_gib: float = 0.0  # memory that a rank may use; 0: what its device has


LIMITS = {"minutes": "> 0", "records": ">= 3", "memory_gib": ">= 0"}


class Machine(NamedTuple):
    """What a rank runs on."""

    name: str
    gib: float
    peak: float | None  # FLOPs a second
    on_gpu: bool


def main(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    init_logger()
    options, job = parse_command(with_variables(argv, os.environ), Options, __doc__)
    check_options(options, LIMITS)
    deadline = Deadline(60 * options.minutes)
    place = find_place()
    check_vlm(job, int(place["NGPU"]))
    out = Path(options.out or Path(job.job.dump_folder) / "tune")
    machine = find_machine(place, options.memory_gib)
    report = Report(
        out, f"{place['NGPU']} x {machine.name}", [n for n, of in BATCH_METRICS.items() if of.capacity]
    )
    if job.job.dry_run:
        return list_candidates(find_space(job, place, machine, deadline, out)[0])
    require_writable(out, "--out")
    require_same_machine(report)
    with locked(out / "lock", f"{out}: another process tunes there; give another --out"):
        space, flops = find_space(job, place, machine, deadline, out)

        def start(member: Member) -> None:
            stopped = Sweeper([member], [place], train_command, out.resolve().name, deadline.end).run()
            if stopped is not None and deadline.left_s():
                raise Ended(stopped)

        freq = log_freq(flops, machine)
        tuner = Tuner(space, report, machine.gib, options.records, freq, start, deadline.left_s)
        return run(tuner, space)


def find_place() -> Place:
    """Where candidates run, one at a time: all GPUs, or NGPU of them; else all cores. Raises ConfigError."""
    machines = number(os.environ, "NNODES", 1)
    require(machines == 1, f"NNODES = {machines}: candidates run on one machine; tune there, with its GPUs")
    threads, gpus = os.environ.get("OMP_NUM_THREADS", ""), gpus_of(os.environ)
    (place,) = places(1, number(os.environ, "NGPU", 0), gpus, available_cores(), threads)
    return place


def find_machine(place: Place, gib: float) -> Machine:
    """`gib`: of a rank, where somebody said. Asked of CUDA in another process, since who asks holds memory of
    the GPU until it ends.
    """
    if "CUDA_VISIBLE_DEVICES" in place:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found = pool.submit(_machine).result()
    else:
        found = _machine()
    its = found.gib if found.on_gpu else found.gib / int(place["NGPU"])
    return found._replace(gib=gib or its)


def _machine() -> Machine:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU of {available_cores()} cores"
    return Machine(name, memory_gib(device), peak_flops(device), on_gpu)


def find_space(
    job: VLMJobConfig, place: Place, machine: Machine, deadline: Deadline, out: Path
) -> tuple[Space, float]:
    """What may be tried, and the FLOPs of the job's full step on a rank. Raises ConfigError."""
    ranks, tokenizer = int(place["NGPU"]), open_tokenizer(job)
    limit = SHARE * max(0.0, machine.gib - UNSEEN_GIB)
    planner = Planner(job, ranks, rows_of(job, tokenizer), machine.on_gpu, limit)
    own = planner.of_job()
    logger.info(
        f"{ranks} x {machine.name}: {machine.gib:.1f} GiB a rank, of which the planner may fill {limit:.1f}; "
        f"{own.batch.global_} slots a step, whatever the candidate"
    )
    # With more or less time the adviser may find others, and a search that goes on would begin again.
    file = out / LENGTHS
    if file.is_file():
        lengths = json.loads(file.read_text())
    else:
        seconds = min(ADVICE_S, deadline.share(ADVICE_SHARE).left_s())
        costs, merge = costs_of_lengths(job, tokenizer, seconds), image_plan(job).merge_size
        lengths = promising(costs, job.data.patches_per_row, merge, machine.on_gpu)
    if not job.job.dry_run:
        write_whole(file, json.dumps(lengths) + "\n")
    return Space(planner, lengths, machine.on_gpu), own.flops / ranks


def costs_of_lengths(job: VLMJobConfig, tokenizer: Tokenizer, seconds: float) -> dict[int, float]:
    """L -> FLOPs of a useful token, padding and all, as the adviser finds them on the job's data."""
    plan, deadline = image_plan(job), Deadline(seconds)
    now = the_job_itself(job, plan)
    assert now is not None  # the job was checked
    data = read_data(job, tokenizer, plan, SAMPLES, deadline)
    with closing(Trials(data, deadline, min(available_cores(), PROCESSES))) as trials:
        search(trials, [now.budget.seq_len], [now.budget.patch_rows], [now.buffer], now)
        return trials.of(now)


def log_freq(flops: float, machine: Machine) -> int:
    """Steps of a record. On a CPU, which never runs ahead, one."""
    if not machine.on_gpu:
        return 1
    step_s = flops / (USUAL_MFU * (machine.peak or USUAL_FLOPS))
    return min(max(1, math.ceil(RECORD_S / step_s)), MOST_STEPS)


def list_candidates(space: Space) -> int:
    """The job as it is, and what would be tried around it."""
    found = [space.own]
    for change in space.changes:
        for direction in change(space.own):
            found += [candidate for candidate in direction if candidate not in found]
    rows = [[*space.shown(each).values(), f"{space.peak_gib(each):.2f}"] for each in found]
    print(columns([[*space.shown(space.own), "planned GiB"], *rows]))
    print("dry run: nothing was trained")
    return 0


def run(tuner: Tuner, space: Space) -> int:
    """Measure, and show what is known, also where somebody ends it. Returns the exit code."""
    try:
        with resumable():
            came_to_its_end = tuner.tune()
    except Ended as ended:
        if tuner.report.best is not None:
            show_report(tuner.report, space)
        report_line(str(ended))
        return ended.code
    show_report(tuner.report, space)
    if not came_to_its_end:
        print("the time was over before the search was: the same command goes on")
    return 0


def show_report(report: Report, space: Space) -> None:
    """The table, what it says, and the lines. Raises UserError where nothing was measured."""
    best, limit = report.best, space.planner.limit_gib
    why = "; ".join(dict.fromkeys(row.trial.why for row in report.rows))
    if best is None:
        raise UserError(
            f"no candidate was measured ({why}): give more --minutes or memory; see {report.folder}"
        )
    print(f"\n{table(report)}\n")
    for place, row in enumerate(report.rows):
        if row.trial.why:
            print(f"{place} was not measured: {row.trial.why}")
    if left_out := space.planner.left_out:
        least = min(left_out.values())
        print(f"{len(left_out)} more need {least:.2f} GiB and more by the plan, which may fill {limit:.2f}")
    print(verdict(report))
    (report.folder / BEST).unlink(missing_ok=True)  # of another best, before the search went on
    if best.settings:
        print(f"\n{toml_lines(best.settings)}\n")
        write_whole(report.folder / BEST, to_toml(with_settings(space.job, best.settings)))
        print(f"all of the job, with them: {report.folder / BEST}")
