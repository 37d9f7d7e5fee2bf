"""What the tests of data preparation share: inputs to write, a quick run, and a plain look at what came out."""

import json
import multiprocessing
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.vlm.prepare import local, worker  # noqa: F401  (imported before the fork, which then takes no time)
from experiments.vlm.prepare.options import Options
from experiments.vlm.prepare.start import prepare

QUICK: dict[str, Any] = {
    "allow_networks": ("127.0.0.1/32",),
    "timeout_s": 2.0,
    "read_timeout_s": 1.0,
    "retries": 1,
    "max_retry_after_s": 5.0,
    "max_bytes": 1 << 20,
    "max_per_host": 16,
    "threads": 2,
}


@dataclass
class Noted:
    """A Progress that remembers."""

    stages: list[tuple[str, int]] = field(default_factory=list)
    count: int = 0
    before: int = 0
    notes: list[str] = field(default_factory=list)

    def stage(self, name: str, total: int) -> None:
        self.stages.append((name, total))
        self.count = self.before = 0

    def advance(self, count: int = 1, failed: int = 0, size: int = 0, before: bool = False) -> None:
        self.count += count
        self.before += count * before
        assert self.count <= self.stages[-1][1], "more than all is done"

    def note(self, text: str) -> None:
        self.notes.append(text)


def run(source: Path, out: Path, **options: Any) -> dict:
    """Prepare in a forked child: the same as scripts/prepare_data.py but for the time to start Python and torch."""
    spawn, multiprocessing.get_context = multiprocessing.get_context, lambda _: spawn("fork")  # type: ignore[assignment,misc]
    try:
        return prepare(Options(input=str(source), out=str(out), **(QUICK | options)), Noted())
    finally:
        multiprocessing.get_context = spawn  # type: ignore[assignment]


def write_tsv(path: Path, pairs: Iterable[tuple[str, str]]) -> Path:
    path.write_text("".join(f"{url}\t{caption}\n" for url, caption in pairs))
    return path


def write_jsonl(path: Path, records: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def samples(out: Path) -> dict[str, dict[str, bytes]]:
    """key -> extension -> bytes, of all shards, in order."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                assert extension not in found.setdefault(key, {})
                found[key][extension] = file.read()
    return found


def rejects(out: Path) -> list[dict]:
    return [json.loads(line) for file in sorted((out / "rejects").glob("*.jsonl")) for line in file.read_text().splitlines()]


def bytes_of(out: Path) -> dict[str, bytes]:
    """Everything that a run leaves for others."""
    files = [*out.glob("*.tar"), *out.glob("rejects/*.jsonl"), out / "report.json"]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}
