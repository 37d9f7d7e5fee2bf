"""One run: its options, folder and plan, and how the records of a shard are walked through.

Every stage walks the same way, so the n-th image of a shard is the same image in all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from experiments.vlm.data.rejects import Rejected
from experiments.vlm.prepare.folder import Folder
from experiments.vlm.prepare.options import Options
from experiments.vlm.prepare.plan import Plan, load_plan, make_plan, sources_of
from experiments.vlm.prepare.records import KINDS, Kind, Record
from experiments.vlm.prepare.rows import read_rows


@dataclass(frozen=True)
class Job:
    options: Options
    folder: Folder
    plan: Plan

    @classmethod
    def begin(cls, options: Options) -> "Job":
        """Makes the plan, or finds it. Raises ConfigError."""
        folder = Folder(Path(options.out))
        return cls(options, folder, make_plan(options, folder))

    @classmethod
    def join(cls, options: Options) -> "Job":
        """For another process of the same run."""
        folder = Folder(Path(options.out))
        return cls(options, folder, load_plan(folder))

    @property
    def shards(self) -> int:
        return len(self.plan.pieces)

    @property
    def kind(self) -> Kind:
        return KINDS[self.plan.kind]

    @cached_property
    def dedup(self) -> bool:
        return self.kind.distinct if self.options.dedup == "auto" else self.options.dedup == "on"

    def records(self, number: int) -> Iterator[tuple[str, Record | Rejected]]:
        """(key, record) of one shard, in the order of the input."""
        sources = sources_of(self.options)
        for index, row in enumerate(read_rows(self.plan.pieces[number])):
            yield f"{number:05d}-{index:05d}", self._record(row, sources)

    def _record(self, row, sources) -> Record | Rejected:
        if isinstance(row, Rejected):
            return row
        try:
            return self.kind.parse(row, sources)
        except Rejected as rejected:
            return rejected
