"""Whatever the storage does, and whenever the run is killed: every good sample once, in the same tensors as
where nothing happened; or a stop with one line, from which the run goes on exactly.
"""

import errno
import hashlib
import json
import os
import random
import signal
from collections import Counter
from pathlib import Path

import pytest

from experiments.vlm.config import Data, Source, VLMJobConfig
from experiments.vlm.data import prefetch
from experiments.vlm.data.loader import Loader
from experiments.vlm.data.sources.shard_cache import ShardCache
from experiments.vlm.data.sources.shards import open_shard
from experiments.vlm.data.storage.file_cache import FileCache
from experiments.vlm.data.storage.outages import Retry
from tests.faults.flaky_store import ERRORS, KINDS, FlakyFileSystem, Store
from tests.samples import jpeg
from tests.tiny_data import Characters, make_job, write_captions, write_documents
from torchtitan.config.errors import StorageError
from torchtitan.tools.signals import StopAsked, StopSignals

SLOTS = 4
Steps = list[dict[int, str]]  # of each step the hash of every slot's tensors


def job_of(root: str, dump: Path, **options) -> VLMJobConfig:
    job = make_job(dump, dump, global_batch_size=SLOTS, local_batch_size=1, epochs=1, **options)
    job.data.sources = [
        Source(name="captions", format="cc12m", path=f"{root}/captions", weight=2.0, shuffle_buffer=4),
        Source(name="documents", format="obelics", path=f"{root}/documents/*.jsonl"),
    ]
    return job


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_captions(folder / "captions", shards=10, records=6)
    write_documents(folder / "documents", shards=5, records=4)
    return folder


class Run:
    """A run of one process that plays all ranks, killed and started anew until its data end."""

    def __init__(self, job: VLMJobConfig, seed: int):
        self.job, self.random = job, random.Random(seed)
        self.state: dict[str, bytes] = {}
        self.steps: Steps = []
        self.samples: Counter[str] = Counter()
        self.stops: list[str] = []
        self.launches = 0

    def go_on(self, most: int, ranks: int = 1) -> bool:
        """Until a stop of the storage or so many steps; whether data are left. Nothing else is kept."""
        self.launches += 1
        # A machine of its own each time: nothing is in its cache.
        self.job.data.cache_folder = str(Path(self.job.job.dump_folder) / f"cache-{self.launches}")
        loaders: list[Loader] = []
        try:
            for rank in range(ranks):
                loaders.append(Loader(self.job, Characters(), rank=rank, ranks=ranks))
                keys = loaders[-1].slot_keys()
                loaders[-1].load_state_dict({key: self.state[key] for key in keys} if self.state else {})
            for _ in range(most):
                if not self._step(loaders):
                    return False
            for loader in loaders:
                next(loader, None)  # one that the trainer never used
        except StorageError as error:
            self.stops.append(str(error))
        finally:
            for loader in loaders:
                loader.close()
        return True

    def _step(self, loaders: list[Loader]) -> bool:
        steps = [next(loader, None) for loader in loaders]
        batches = {
            slot: batch
            for loader, step in zip(loaders, steps, strict=True)
            if step is not None
            for slot, batch in zip(loader.slots, step.batches, strict=True)
        }
        if not any(batch.samples for batch in batches.values()):
            return False
        self.steps.append({slot: hash_of(batch) for slot, batch in batches.items()})
        delivered = [sample for batch in batches.values() for sample in batch.samples if sample.offset == 0]
        self.samples.update(f"{sample.shard.rpartition('/')[2]} {sample.key}" for sample in delivered)
        self.state = {key: value for step in steps if step is not None for key, value in step.state().items()}
        return True


def hash_of(batch) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(batch.tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory) -> Run:
    run = Run(job_of(str(folder), tmp_path_factory.mktemp("whole")), 0)
    assert not run.go_on(1000)
    assert len(run.steps) > 6 and len(run.samples) == 10 * 6 + 5 * 4 and set(run.samples.values()) == {1}
    return run


def finish(run: Run) -> None:
    """Kill it at random moments, and start it at random sizes."""
    while run.go_on(run.random.choice((1, 2, 4)), run.random.choice((1, 2, 4))):
        assert run.launches < 200, "it makes no progress"


@pytest.mark.parametrize("kind", [*KINDS, "all"])
def test_a_flaky_store_changes_nothing_that_is_delivered(folder, undisturbed, tmp_path, monkeypatch, kind):
    kinds = KINDS if kind == "all" else (kind,)
    with Store(folder, kinds, seed=len(kind)).serving(monkeypatch) as store:
        run = Run(job_of("flaky:/", tmp_path, decode_threads=2), seed=len(kind))
        finish(run)
    assert run.steps == undisturbed.steps and run.samples == undisturbed.samples
    assert store.failures and run.launches > 1
    assert all("\n" not in stop and "data.storage_timeout_s" in stop for stop in run.stops)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_store_that_is_away_for_good_stops_the_run_where_it_was(
    folder, undisturbed, tmp_path, monkeypatch, steps
):
    with Store(folder, (), 0).serving(monkeypatch) as store:
        run = Run(job_of("flaky:/", tmp_path), 0)
        assert steps == 0 or run.go_on(steps)
        store.away = True
        assert run.go_on(1000, 2)
        (stop,) = run.stops
        assert "[Errno 5] Input/output error" in stop and "600 s (data.storage_timeout_s = 600)" in stop
        assert len(run.steps) == steps and 600 <= store.now < 1800, "and no longer"
        store.away = False
        finish(run)
    assert run.steps == undisturbed.steps and run.samples == undisturbed.samples


def test_a_store_that_goes_away_while_the_run_reads_stops_it_after_a_whole_step(
    folder, undisturbed, tmp_path, monkeypatch
):
    with Store(folder, (), 0).serving(monkeypatch) as store:
        run = Run(job_of("flaky:/", tmp_path, packing_buffer_size=2), 0)
        whole = Run(job_of(str(folder), tmp_path / "whole", packing_buffer_size=2), 0)
        whole.go_on(1000)
        step = run._step

        def step_until_it_is_away(loaders):
            store.away = len(run.steps) >= 2
            return step(loaders)

        run._step = step_until_it_is_away  # type: ignore[method-assign]
        assert run.go_on(1000) and len(run.stops) == 1 and 2 <= len(run.steps) < len(whole.steps)
        store.away, run._step = False, step  # type: ignore[method-assign]
        finish(run)
    assert run.steps == whole.steps and run.samples == whole.samples


@pytest.mark.parametrize("kind", ["EIO", "too many open files"])
def test_local_files_that_fail_for_a_while_change_nothing(folder, undisturbed, tmp_path, monkeypatch, kind):
    true_pread = os.pread
    with Store(folder, (kind,), seed=3, chance=0.02).serving(monkeypatch) as store:

        def pread(file, size, offset):
            store.operate()
            return true_pread(file, size, offset)

        monkeypatch.setattr(os, "pread", pread)
        run = Run(job_of(str(folder), tmp_path), seed=1)
        finish(run)
    assert run.steps == undisturbed.steps and run.samples == undisturbed.samples and store.failures


@pytest.mark.parametrize("kind", [*ERRORS, "short reads", "wrong lengths"])
def test_images_that_lie_beside_their_records_are_waited_for_too(tmp_path, monkeypatch, kind):
    images = {f"{number}.jpg": jpeg(seed=number) for number in range(20)}
    (tmp_path / "d").mkdir()
    for name, image in images.items():
        (tmp_path / "d" / name).write_bytes(image)
    record = {"texts": [None] * 22, "images": [*images, "gone.jpg", "odd*.jpg"]}
    (tmp_path / "d" / "a.jsonl").write_text(json.dumps(record))
    data, source = Data(cache_folder=str(tmp_path / "cache")), Source(format="obelics")
    with Store(tmp_path, (kind,), seed=1).serving(monkeypatch) as store:
        cache = ShardCache(lambda _, path: open_shard(path, source, data), 1, Retry(600))
        document, lost = cache.use(0, "flaky://d/a.jsonl", lambda shard: shard.read(0))
        loaded = [
            cache.use(0, "flaky://d/a.jsonl", lambda shard, part=part: shard.load(part))
            for part in document.parts
        ]
    assert loaded == list(images.values()) and store.failures
    assert [reject.reason for reject in lost] == ["image_missing"] * 2


def test_a_shard_that_is_deleted_by_name_is_a_reject_and_stops_nothing(folder, tmp_path, monkeypatch):
    with Store(folder, ("EIO",), 0).serving(monkeypatch):
        job = job_of("flaky:/", tmp_path)
        job.data.sources[0].path = "flaky://captions/captions-{0..10}.tar"
        run = Run(job, 0)
        loader = Loader(job, Characters())
        finish(run)
        loader.close()
    assert len([key for key in run.samples if key.startswith("captions")]) == 60
    assert set(run.samples.values()) == {1}


def test_a_full_cache_disk_stops_the_run_with_one_line_and_it_goes_on_elsewhere(
    folder, undisturbed, tmp_path, monkeypatch
):
    with Store(folder, (), 0).serving(monkeypatch) as store:
        run = Run(job_of("flaky:/", tmp_path), 0)
        assert run.go_on(2)
        with monkeypatch.context() as full:

            def no_room(self, size=0, copy=None):
                raise OSError(errno.ENOSPC, "No space left on device")

            full.setattr(FileCache, "make_room", no_room)
            before = store.now
            assert run.go_on(1000) and store.now < before + 60, "it is not waited for"
        (stop,) = run.stops
        assert "No space left on device" in stop and "data.cache_folder" in stop and "\n" not in stop
        finish(run)
    assert run.steps == undisturbed.steps and run.samples == undisturbed.samples


def test_a_signal_ends_the_wait_for_a_store_that_is_away(folder, tmp_path, monkeypatch):
    store, sent = Store(folder, (), 0), []
    monkeypatch.setattr(FlakyFileSystem, "store", store, raising=False)
    monkeypatch.setattr(prefetch, "STILL_WAITING_S", 0.05)
    loader = Loader(job_of("flaky:/", tmp_path, packing_buffer_size=2), Characters())
    signals, waiting = StopSignals(), loader.still_waiting

    def wait_on() -> None:
        if store.away and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        waiting()

    loader.still_waiting = wait_on
    try:
        with pytest.raises(StopAsked):
            while step := next(loader):
                state, store.away = step.state(), True
        assert loader.state_dict() == state
    finally:
        loader.close()
        signals.close()
