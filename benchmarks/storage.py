"""What does opening shards cost a run, where each takes long to open?

    python -m benchmarks.storage [--latencies 0 1 5 15] [--steps 75] [--scale 20]

Measured: the loader's own readers over a file system of this file's own, slow://, in which opening a shard
takes a while. A step of training takes 1.1 s, a shard lasts about 25 of them, two steps are ready before they
are asked for. All times pass `scale` times as fast, and are printed as if they did not. `at need` opens a
shard when its first record is asked for, `ahead` as the loader does.

Simulated: 512 ranks, which all wait for the slowest, long after the start; 2,176 shards of 4,600 samples; 40
samples of each slot a step (rows of 8,192 tokens), half a second to decode a step, one worker a rank.

Counted: reads that find the samples of such a shard, what is kept of them, and what a slot's state takes.

Expected. At need every shard adds its latency to a step, less what two steps hide: one slot, 15 s and 25
steps of 1.1 s make (27.5 + 15 - 2.2) / 25 = 1.6 s a step; eight slots, which wait one after the other, 5.8 s.
Ahead 1.1 s for both, as 15 s is less than the 27.5 s that a shard lasts. The first step waits for one
opening, not for one a slot. Of 512 ranks 4.5 open a shard in each step: 15 s at need make all wait for
somebody most of the time, about 5 s a step at one slot a rank and more at eight; ahead nobody waits, since a
shard lasts 115 steps, and half a shard, where eight slots a rank share them, 58. A shard's samples are found
in one read a megabyte, 160 in place of 13,800, and later in one of 150 KB.
"""

import argparse
import json
import os
import queue
import tarfile
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from experiments.vlm.batch import BatchShape
from experiments.vlm.config import Source, VLMJobConfig
from experiments.vlm.data.formats.tar_index import find_samples
from experiments.vlm.data.producer import Producer
from experiments.vlm.data.setup import make_setup
from experiments.vlm.data.shared_memory import Buffers, slot_views
from experiments.vlm.data.slot_state import save_states
from experiments.vlm.data.sources.order import Deal
from experiments.vlm.data.sources.reader import SourceReader
from experiments.vlm.data.sources.shard_cache import ShardCache
from experiments.vlm.data.storage.outages import Retry
from torchtitan.components.tokenizer import load_tokenizer

TOKENIZER = str(Path(__file__).parent.parent / "assets/tokenizer")
STEP_S = 1.1
SHARD_STEPS = 25
PREFETCH = 2
ROW, A_ROW = 256, 5  # tokens; samples that fill them
RANKS, SHARDS, SAMPLES = 512, 2176, 4600
A_STEP, DECODE_S = 40, 0.5  # samples of a slot; of a rank
KINDS = ("at need", "ahead")


class SlowFileSystem(LocalFileSystem):
    """Local files that take `latency_s` to open."""

    protocol = "slow"
    latency_s = 0.0
    opened = 0

    def _open(self, path: str, mode: str = "rb", block_size: Any = None, **options: Any) -> Any:
        time.sleep(self.latency_s)
        type(self).opened += 1
        return super()._open(path, mode, block_size, **options)


fsspec.register_implementation("slow", SlowFileSystem, clobber=True)


@contextmanager
def opening(kind: str) -> Iterator[None]:
    """Open shards `at need`, as it was before they were opened ahead, or `ahead`."""
    ahead = ShardCache.ahead
    if kind == "at need":
        ShardCache.ahead = lambda self, source, path: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        ShardCache.ahead = ahead  # type: ignore[method-assign]


def job_of(data: Path, cache: str, slots: int) -> VLMJobConfig:
    job = VLMJobConfig()
    job.training.seq_len, job.training.global_batch_size = ROW, slots
    job.data.patches_per_row, job.data.max_patches_per_image = 64, 64
    job.data.packing_buffer_size, job.data.cache_folder = 8, cache
    job.data.sources = [Source(name="texts", format="text", path=f"slow://{data}")]
    return job


def write_texts(folder: Path, shards: int) -> None:
    """A_ROW of them fill a row."""
    line = json.dumps({"text": "a cat " * 25}) + "\n"
    for number in range(shards):
        (folder / f"{number:02}.jsonl").write_text(line * A_ROW * SHARD_STEPS)


def measure(data: Path, slots: int, latency_s: float, steps: int, scale: float) -> dict[str, float]:
    """Seconds to the first step, and of a step after it."""
    SlowFileSystem.latency_s = latency_s / scale
    ready: queue.Queue = queue.Queue(PREFETCH)
    over = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        setup = make_setup(job_of(data, folder, slots), load_tokenizer(TOKENIZER), "train", slots)
        began = time.perf_counter()
        cache = ShardCache(setup.open_shard, 3 * slots, Retry(600))
        readers = [SourceReader(0, setup.deals[0], slot, cache) for slot in range(slots)]
        for reader in readers:
            reader.open_ahead(0)
        records = [reader.records(_refuse, _refuse) for reader in readers]

        def produce() -> None:
            while not over.is_set():
                ready.put([next(of_slot) for of_slot in records for _ in range(A_ROW)])

        worker = threading.Thread(target=produce)
        worker.start()
        ready.get()
        first_s = time.perf_counter() - began
        for _ in range(steps):
            time.sleep(STEP_S / scale)
            ready.get()
        elapsed_s = time.perf_counter() - began - first_s
        over.set()
        while worker.is_alive():
            while not ready.empty():
                ready.get()
            worker.join(0.01)
        cache.close()
    return {"first_s": first_s * scale, "step_s": elapsed_s / steps * scale}


def _refuse(what: object) -> None:
    raise AssertionError(f"all data are good: {what}")


def bytes_of_state(data: Path, slots: int = 8) -> float:
    """Bytes of a slot's state in a checkpoint."""
    SlowFileSystem.latency_s = 0
    with tempfile.TemporaryDirectory() as folder:
        setup = make_setup(job_of(data, folder, slots), load_tokenizer(TOKENIZER), "train", slots)
        shape = BatchShape(slots, ROW, 1, 64, 16)
        arrays = Buffers(shape, 1).arrays[0]
        producer = Producer(setup, range(slots), {})
        steps = producer.start(range(slots), [slot_views(arrays, place, 1) for place in range(slots)])()
        producer.close()
    states = save_states({step.filled.slot: step.state for step in steps}, {}, "")
    return sum(map(len, states.values())) / slots


def simulate(kind: str, slots: int, latency_s: float, steps: int = 1200) -> dict[str, float]:
    """`slots`: of a rank, whose worker plans them one after the other; all ranks wait for the slowest."""
    random = np.random.default_rng(0)
    deal = Deal("captions", tuple(f"{n}.tar" for n in range(SHARDS)), RANKS * slots, 0, None)
    left = random.random((RANKS, slots)) * SAMPLES / deal.eras[-1].parts
    opens = 0
    # At the start one good sample is looked for; then the first shards of all slots are opened.
    first_s = latency_s * (1 + (slots if kind == "at need" else 1)) + DECODE_S
    is_open_at = np.full(left.shape, -latency_s)  # of the next shard of each slot
    produced, trained = np.zeros(RANKS), [STEP_S]
    for step in range(1, steps):
        begun = np.maximum(produced, trained[step - 1 - PREFETCH] if step > PREFETCH else 0.0)
        left -= random.poisson(A_STEP, left.shape)
        ends = left < 0
        opens += int(ends.sum())
        late = np.maximum(0.0, is_open_at - begun[:, None]) if kind == "ahead" else latency_s
        waits = np.where(ends, late, 0.0)
        produced = begun + (waits.max(1) if kind == "ahead" else waits.sum(1)) + DECODE_S
        is_open_at = np.where(ends, (produced + latency_s)[:, None], is_open_at)
        left += np.where(ends, random.normal(SAMPLES, 60, left.shape) / deal.eras[-1].parts, 0.0)
        trained.append(max(trained[-1], produced.max()) + STEP_S)
    return {"first_s": first_s, "step_s": trained[-1] / steps, "opens": opens / steps}


def count_reads() -> dict[str, int]:
    """Reads and bytes that find the 4,600 samples of 33 KB of a shard made of headers and holes."""
    reads, true_pread = [], os.pread

    def pread(file: int, size: int, offset: int) -> bytes:
        block = true_pread(file, size, offset)
        reads.append(len(block))
        return block

    with tempfile.TemporaryFile() as file:
        for number in range(SAMPLES):
            for kind, size in (("jpg", 33_000), ("txt", 80), ("json", 400)):
                header = tarfile.TarInfo(f"{number:09}.{kind}")
                header.size = size
                file.write(header.tobuf())
                file.seek(-(-size // 512) * 512, os.SEEK_CUR)
        file.write(bytes(1024))
        file.flush()
        os.pread = pread
        try:
            found = find_samples(file.fileno())
        finally:
            os.pread = true_pread
        assert len(found.starts) == SAMPLES + 1
        size = os.fstat(file.fileno()).st_size
    return {
        "headers": 3 * SAMPLES,
        "reads": len(reads),
        "bytes": sum(reads),
        "shard_bytes": size,
        "kept_bytes": 8 * (len(found.headers) + len(found.starts)),
    }


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print both, at need and ahead, for each latency and number of slots."""
    print(f"\n{title}\n\n| slots a rank | to open | first step: at need, ahead | a step: at need, ahead |")
    print("|---|---|---|---|")
    for row in rows:
        need, ahead = row["at need"], row["ahead"]
        print(
            f"| {row['slots']} | {row['latency_s']:g} s | {need['first_s']:.1f} s, {ahead['first_s']:.1f} s "
            f"| {need['step_s']:.2f} s, {ahead['step_s']:.2f} s |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--latencies", type=float, nargs="+", default=[0, 1, 5, 15])
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--scale", type=float, default=20)
    options = parser.parse_args()
    measured, simulated = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_texts(Path(folder), 48)
        state = bytes_of_state(Path(folder))
        for slots, latency_s in product((1, 8), options.latencies):
            row: dict[str, Any] = {"slots": slots, "latency_s": latency_s}
            simulation = dict(row)
            for kind in KINDS:
                with opening(kind):
                    row[kind] = measure(Path(folder), slots, latency_s, options.steps, options.scale)
                simulation[kind] = simulate(kind, slots, latency_s)
            measured.append(row)
            simulated.append(simulation)
    table("Measured", measured)
    table(f"Simulated: {RANKS} ranks, {SHARDS:,} shards", simulated)
    counted = count_reads()
    names = json.dumps([f"cc12m-train-{number:04d}.tar" for number in range(SHARDS)])
    opens = {row["slots"]: row["ahead"]["opens"] for row in simulated}
    print(
        f"\nshards opened a step by {RANKS} ranks: {opens[1]:.1f} at one slot each, {opens[8]:.1f} at eight\n"
        f"a shard of {counted['shard_bytes'] / 1e6:.0f} MB with {counted['headers']:,} headers: found in "
        f"{counted['reads']:,} reads of {counted['bytes'] / 1e6:.0f} MB, later in one of "
        f"{counted['kept_bytes'] / 1e3:.0f} KB\n"
        f"state: {state:.0f} bytes a slot with 8 samples that wait; once for all of them "
        f"{len(zlib.compress(names.encode())):,} bytes of shards' names"
    )
    print(json.dumps({"measured": measured, "simulated": simulated, "counted": counted}))


if __name__ == "__main__":
    main()
