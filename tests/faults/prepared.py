"""What the tests of data preparation share: inputs to write, a quick run,
and a plain look at what came out.
"""

import json
import os
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.vlm.prepare import start, worker
from experiments.vlm.prepare.options import Options

QUICK: dict[str, Any] = {
    "allow_networks": ("127.0.0.1/32",),
    "timeout_s": 120,  # of a busy machine
    "read_timeout_s": 120,
    "retries": 1,
    "max_retry_after_s": 5.0,
    "max_bytes": 1 << 20,
    "max_per_host": 16,
    "threads": 2,
}


SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"


# QUICK for the script, but for the networks.
QUICK_OPTIONS = [f"--{name}={value}" for name, value in QUICK.items() if name != "allow_networks"]


def command(source: Path, out: Path, *options: str) -> list[str]:
    """The script, as a person would start it; images come from this machine."""
    given = ["--input", str(source), "--out", str(out), *options]
    return [sys.executable, str(SCRIPT), *given, "--allow_networks", *QUICK["allow_networks"]]


@dataclass
class Noted:
    """A StageProgress that remembers."""

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


class ForkedWorker:
    """In place of the process that run_local starts: the same code, without starting Python and torch."""

    def __init__(self) -> None:
        (its_in, our_out), (our_in, its_out) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            self._work(its_in, its_out, (our_out, our_in))
        os.close(its_in)
        os.close(its_out)
        self.stdin, self.stdout = os.fdopen(our_out, "wb"), os.fdopen(our_in, "rb")

    def _work(self, its_in: int, its_out: int, not_its: tuple[int, int]) -> None:
        os.setsid()
        for file in not_its:
            os.close(file)
        for stream, file in enumerate((its_in, its_out, os.open(os.devnull, os.O_WRONLY))):
            os.dup2(file, stream)
        os.close(its_out)
        sys.stdin = os.fdopen(0)
        worker.main()
        os._exit(0)

    def wait(self) -> int:
        self.stdin.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def run(source: Path, out: Path, **options: Any) -> dict:
    real, start.start_worker = start.start_worker, ForkedWorker  # type: ignore[assignment]
    try:
        return start.prepare(Options(input=str(source), out=str(out), **(QUICK | options)), Noted())
    finally:
        start.start_worker = real


def written(report: dict, what: str = "samples") -> int:
    (source,) = report["sources"].values()
    return source["counts"].get(what, 0)


def left_out(report: dict, what: str = "samples") -> dict[str, int]:
    """By reason."""
    (source,) = report["sources"].values()
    return {reason: entry["count"] for reason, entry in source["rejected"].get(what, {}).items()}


def write_tsv(path: Path, pairs: Iterable[tuple[str, str]]) -> Path:
    path.write_text("".join(f"{url}\t{caption}\n" for url, caption in pairs))
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
    return [
        json.loads(line)
        for file in sorted((out / "rejects").glob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]


def bytes_of(out: Path) -> dict[str, bytes]:
    """Everything that a run leaves for others."""
    files = [*out.glob("*.tar"), *out.glob("rejects/*.jsonl"), out / "report.json"]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}
