"""The stages of a run, in order, on this machine or on a cluster.

    list      each shard: hashes of its URLs           then: which are not the first of the input
    collect   each shard: fetch, judge, encode         then: which images are not the first of their content
    write     each shard: tar, rejects, report         then: one report of all

A stage does a shard again without harm, and skips what is there: that is all there is to resuming and to
retries.
"""

from collections.abc import Callable, Iterable

import numpy as np

from experiments.vlm.data.report import Tally
from experiments.vlm.prepare.collect import collect
from experiments.vlm.prepare.dedup import list_urls, mark_repeated
from experiments.vlm.prepare.folder import read_array, read_json, remove, write_json
from experiments.vlm.prepare.progress import StageProgress
from experiments.vlm.prepare.shard import write_shard
from experiments.vlm.prepare.shard_plan import PrepareJob
from experiments.vlm.prepare.stop import Stop

Stage = Callable[[PrepareJob, Iterable[int], StageProgress, Stop], None]


def _each(work: Callable[[PrepareJob, int], None]) -> Stage:
    def stage(job: PrepareJob, numbers: Iterable[int], progress: StageProgress, stop: Stop) -> None:
        for number in numbers:
            stop.check()
            work(job, number)
            progress.advance(job.plan.pieces[number].count)

    return stage


STAGES: dict[str, Stage] = {"list": _each(list_urls), "collect": collect, "write": _each(write_shard)}


def run(job: PrepareJob, progress: StageProgress, run_stage: Callable[[str, list[int]], None]) -> None:
    """Do all stages, the report last. Raises Stopped. run_stage: does a key of STAGES for these shards."""
    folder, shards = job.folder, range(job.shards)
    todo = [number for number in shards if not folder.done(number).exists()]
    if todo:
        rows = sum(job.plan.pieces[number].count for number in todo)
        progress.stage("records read", job.plan.records)
        run_stage("list", list(shards))
        if job.dedup:
            mark_repeated(folder, "urls", job.shards)
        progress.stage(
            "images", sum(len(read_array(folder.hashes("urls", number), np.uint64)) for number in todo)
        )
        run_stage("collect", todo)
        if job.dedup:
            mark_repeated(folder, "content", job.shards)
        progress.stage("records written", rows)
        run_stage("write", todo)
    write_report(job)


def write_report(job: PrepareJob) -> None:
    """The report of the whole run, of the shards' own; then little of the state is needed any more."""
    total, shards = Tally(), 0
    for number in range(job.shards):
        tally = Tally(read_json(job.folder.done(number)))
        shards += bool(tally.of(job.plan.format)["counts"].get("samples"))
        total.add(tally)
    plan = job.plan
    about = {"format": plan.format, "shards": shards, "options": plan.options, "inputs": plan.inputs}
    write_json(job.folder.report, {**about, "sources": total.sources})
    for leftover in ("urls", "content", "journal", "images", "inputs"):
        remove(job.folder.state / leftover)
