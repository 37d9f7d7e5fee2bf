"""One listing for a job: ranks that start while files arrive read the same shards, and refuse the same."""

import os
from collections import Counter
from functools import partial
from pathlib import Path

import torch.distributed as dist

from experiments.vlm.config import Source
from experiments.vlm.data import ranks
from experiments.vlm.data.loader import Loader
from tests.reference.ranks import on_two_ranks
from tests.tiny_data import Characters, make_job, write_captions
from torchtitan.config.errors import ConfigError
from torchtitan.distributed.collectives import agree_on_data


def count_listings() -> list[str]:
    listed, true_list = [], ranks.list_shards

    def list_shards(path, *options):
        listed.append(path)
        return true_list(path, *options)

    ranks.list_shards = list_shards
    return listed


def start(folder: Path, rank: int) -> dict:
    """Open the loaders of a run, one rank of two, while the other rank adds a shard; then go on from a
    checkpoint after that rank wrote all shards anew.
    """
    listed = count_listings()
    job = make_job(folder, folder / "out", global_batch_size=2, local_batch_size=1)
    job.data.sources = [Source(name="captions", format="cc12m", path=str(folder / "train"))]
    job.validation.enable = True
    job.validation.sources = [Source(name="held out", format="cc12m", path=str(folder / "validation"))]
    if rank == 1:
        os.link(folder / "train" / "captions-0.tar", folder / "train" / "captions-9.tar")
    place = {"rank": rank, "ranks": 2, "agree": agree_on_data}
    loaders = [
        Loader(job, Characters(), split=split, **place) for split in ("train", "validation", "validation")
    ]
    state = next(loaders[0]).state()
    dist.barrier()
    if rank == 1:
        write_captions(folder / "train", seed=5)
    dist.barrier()
    told = ""
    try:
        loaders[0].load_state_dict(state)
    except ConfigError as error:
        told = str(error)
    for loader in loaders:
        loader.close()
    shards = [loader.setup.deals[0].shards for loader in loaders]
    return {"listed": listed, "shards": shards, "told": told}


def test_one_rank_lists_for_all_and_all_refuse_what_one_finds(tmp_path):
    write_captions(tmp_path / "train")
    write_captions(tmp_path / "validation", shards=1)
    first, second = on_two_ranks(partial(start, tmp_path), tmp_path)
    assert Counter(first["listed"]) == {str(tmp_path / split): 1 for split in ("train", "validation")}
    assert second["listed"] == []
    assert first["shards"] == second["shards"]
    assert first["told"] == second["told"] and "has been written anew" in first["told"]
