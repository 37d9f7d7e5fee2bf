"""What the ranks of a job come to know together: one lists the shards for all, and for the whole run.

Otherwise a file that arrives meanwhile would be on the lists of some ranks only, and each would ask the hub.
"""

import weakref
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from experiments.vlm.config import Source, VLMJobConfig
from experiments.vlm.data.setup import Shards, Split, sources_of
from experiments.vlm.data.sources.shards import EMBEDDED, list_shards
from torchtitan.distributed.collectives import from_all_ranks, from_first_rank, wait_together

T = TypeVar("T")


class Ranks:
    """`together`: all ranks make the same calls; else, and where there is one, each decides alone."""

    def __init__(self, together: bool):
        self.together = together and dist.is_initialized() and dist.get_world_size() > 1

    def from_first(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, however long its storage lets it wait. Raises the UserError that it raises."""
        if not self.together:
            return decide()
        decided = wait_together(lambda: [decide()] if dist.get_rank() == 0 else [])
        return from_first_rank(lambda: decided[0])

    def wait_together(self, work: Callable[[], T]) -> T:
        """What `work` returns on this rank, however long the storage of any rank lets it wait."""
        return wait_together(work) if self.together else work()

    def from_all(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        return from_all_ranks(value) if self.together else [value]


def shards_of(job: VLMJobConfig, split: Split, ranks: Ranks) -> list[Shards]:
    """The shards of each source, once for all loaders of ranks that go together. Raises ConfigError."""
    if not ranks.together:
        return [_list(source, job, split) for source in sources_of(job, split)]
    if id(job) not in _listed:
        _listed[id(job)] = {}
        weakref.finalize(job, _listed.pop, id(job), None)
    if split not in _listed[id(job)]:
        _listed[id(job)][split] = list_for_all(job, split, ranks)
    return _listed[id(job)][split]


def list_for_all(job: VLMJobConfig, split: Split, ranks: Ranks) -> list[Shards]:
    """The shards as they are now, the same on all ranks. Raises ConfigError."""
    # By rank 0; but what is embedded is drawn, and so listed, on each machine.
    sources = sources_of(job, split)
    of_first = ranks.from_first(
        lambda: [() if source.path.startswith(EMBEDDED) else _list(source, job, split) for source in sources]
    )
    return [shards or _list(source, job, split) for source, shards in zip(sources, of_first, strict=True)]


def _list(source: Source, job: VLMJobConfig, split: Split) -> Shards:
    return tuple(list_shards(source.path, source.format, job.data, split))


_listed: dict[int, dict[Split, list[Shards]]] = {}  # by the job's identity, while there is that job
