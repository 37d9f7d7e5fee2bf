"""New shards join a run of several ranks on all of them with the same step."""

from collections import Counter
from pathlib import Path

import torch.distributed as dist

from experiments.vlm.data.loader import Loader
from tests.tiny_data import Characters
from tests.unit.test_changed_shards import job_of, names_in, write_shard
from torchtitan.distributed.collectives import agree_on_data


def steps_of_two(folder: Path) -> tuple[list[list[str]], str]:
    """This rank's samples of each step, and the shards at the end; one is written while they run."""
    job = job_of(folder / "data", folder / "out", "jsonl", epochs=4, global_batch_size=4, local_batch_size=2)
    job.data.join_new_shards, job.data.new_shards_freq = True, 3
    loader, steps = Loader(job, Characters(), rank=dist.get_rank(), ranks=2, agree=agree_on_data), []
    for step in loader:
        steps.append(names_in(step))
        if len(steps) == 2 and dist.get_rank() == 0:
            write_shard(folder / "data", 7, "jsonl")
    loader.close()
    return steps, str([deal.shards for deal in loader.setup.deals])


def test_all_ranks_let_a_shard_in_together(pool, tmp_path):
    old = [name for number in range(3) for name in write_shard(tmp_path / "data", number, "jsonl")]
    (first, shards), (second, others) = pool.run(2, steps_of_two, tmp_path)
    assert len(first) == len(second) and "shard-7" in shards and shards == others
    came = Counter(name for steps in (first, second) for step in steps for name in step)
    assert {came[name] for name in old} == {4}
    times = {came[f"07-{record:03d}"] for record in range(12)}
    assert len(times) == 1 and 1 <= times.pop() <= 3
