"""The same stages on a Ray cluster, a task for each shard. All nodes must share the output folder.

A node that dies costs its tasks, which Ray starts again elsewhere: what they had fetched is in their
journals. The limits of politeness hold for each task, so a host may see them as many times as there are tasks
at once (--max_per_host).
"""

import os
from collections import deque
from functools import partial
from pathlib import Path

import ray
import torch

import experiments
from experiments.vlm.prepare.options import Options
from experiments.vlm.prepare.progress import StageProgress
from experiments.vlm.prepare.runner import STAGES, run
from experiments.vlm.prepare.shard_plan import PrepareJob
from experiments.vlm.prepare.stop import Stop

LOST_NODES = 20  # times that a task is started again because its node or process died
WAITING = 2  # tasks that wait for each that can run: a billion URLs are too many to hand in at once


class Sum:
    """A StageProgress that adds up what a task did."""

    def __init__(self) -> None:
        self.total = {False: [0, 0, 0], True: [0, 0, 0]}

    def stage(self, name: str, total: int) -> None:
        """Nothing: the task's caller has begun the stage."""

    def note(self, text: str) -> None:
        """Nothing: notes of a task have nobody to read them."""

    def advance(self, count: int = 1, failed: int = 0, size: int = 0, before: bool = False) -> None:
        """Adds to the total; work done before is kept apart."""
        self.total[before] = [
            old + new for old, new in zip(self.total[before], (count, failed, size), strict=True)
        ]


@ray.remote(max_retries=LOST_NODES)
def do_shard(options: Options, stage: str, number: int) -> dict[bool, list[int]]:
    """A stage of one shard, on some node. What it did, as Sum.total."""
    torch.set_num_threads(1)
    progress = Sum()
    STAGES[stage](PrepareJob.join(options), [number], progress, Stop())
    return progress.total


def do_stage(options: Options, progress: StageProgress, stage: str, numbers: list[int]) -> None:
    """A task for each shard, few of them waiting at a time. Results come in any order; what they leave on
    disk does not depend on it. Raises what a task raised.
    """
    left = deque(numbers)
    running: list[ray.ObjectRef] = []
    while left or running:
        while left and len(running) < WAITING * max(1, int(ray.cluster_resources().get("CPU", 1))):
            running.append(do_shard.remote(options, stage, left.popleft()))
        ended, running = ray.wait(running, timeout=1.0)
        for total in ray.get(ended):
            for before, (count, failed, size) in total.items():
                progress.advance(count, failed, size, before)


def run_on_cluster(options: Options, progress: StageProgress) -> None:
    """Do all stages of a run whose plan is made."""
    # The nodes import this very code: its folder is taken to be where it is here.
    path = os.pathsep.join([str(Path(experiments.__path__[0]).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(options.ray_address, runtime_env={"env_vars": {"PYTHONPATH": path}}, log_to_driver=False)
    try:
        run(PrepareJob.join(options), progress, partial(do_stage, options, progress))
    finally:
        ray.shutdown()
