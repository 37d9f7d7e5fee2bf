"""`rejects/RANK.jsonl`: a line for each rejected sample, image or shard, each once in a run whatever was
restarted.
"""

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from experiments.vlm.data.rejects import Reject
from torchtitan.tools.logging import logger


class RejectLog:
    """Appends to this rank's file and reads those of the others, since a later epoch may deal a sample to
    another rank.

    The first of a reason in a shard is logged too, as a line for people; without a folder that is all.
    """

    def __init__(self, folder: Path | None, rank: int):
        self.folder = folder
        self.path = folder / f"{rank}.jsonl" if folder else None
        self.known: set[int] = set()  # hashes of identities: a million rejects cost 60 MB
        self.read: dict[Path, int] = {}  # bytes of each file that are in `known`
        self.logged: set[tuple[str, str]] = set()

    def write(self, rejects: Iterable[Reject]) -> None:
        """A line in the file for each that is new; the log gets the first of a reason and shard."""
        new = [reject for reject in rejects if hash(reject.identity) not in self.known]
        if not new:
            return
        with self._open() as file:
            for reject in new:
                identity = hash(reject.identity)
                if identity in self.known:
                    continue
                self.known.add(identity)
                file.write(json.dumps(reject.line()) + "\n")
                self._log(reject)

    def _open(self) -> TextIO:
        """This rank's file, to append to; what is in all of them by now is known then."""
        if self.folder is None or self.path is None:
            return io.StringIO()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._catch_up(self.folder)
        return self.path.open("a", encoding="utf-8", errors="backslashreplace")

    def _catch_up(self, folder: Path) -> None:
        for path in folder.glob("*.jsonl"):
            start = self.read.get(path, 0)
            if os.path.getsize(path) == start:
                continue
            with path.open("rb") as file:
                file.seek(start)
                whole, _, rest = file.read().rpartition(b"\n")
            lines = whole.splitlines()
            self.read[path] = start + sum(len(line) + 1 for line in lines)
            self.known.update(hash(Reject(**json.loads(line)).identity) for line in lines)
            if rest and path == self.path:
                os.truncate(path, self.read[path])  # a line that a kill cut short

    def _log(self, reject: Reject) -> None:
        kind = reject.shard, reject.reason
        if kind in self.logged:
            return
        self.logged.add(kind)
        more = f"; more of this kind in {self.path}" if self.path else "; more of this kind are not shown"
        logger.warning(
            f"source {reject.source}, shard {reject.shard}, sample {reject.key or '-'}: {reject}{more}"
        )
