"""Shards are open before they are needed, and what is read stays what it was."""

import threading

import pytest

from experiments.vlm.data import producer as producer_module
from experiments.vlm.data.loader import Loader
from experiments.vlm.data.producer import Producer
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.setup import make_setup
from experiments.vlm.data.slot import Slot
from experiments.vlm.data.sources.order import Deal
from experiments.vlm.data.sources.reader import SourceReader
from experiments.vlm.data.sources.shard_cache import ShardCache
from experiments.vlm.data.storage.outages import Retry
from tests.samples import jpeg, write_tar
from tests.tiny_data import Characters, make_job, write_all, write_captions

WAIT_S = 20.0  # of a busy machine


class Shards:
    """Opens shards of four records, and says who opened which."""

    def __init__(self):
        self.rejects = []
        self.opened = {}
        self.opening = threading.Condition()

    def open(self, source, path):
        with self.opening:
            self.opened[path] = threading.current_thread().name
            self.opening.notify_all()
        return self

    def wait_for(self, path):
        with self.opening:
            assert self.opening.wait_for(lambda: path in self.opened, WAIT_S), f"{path} is not opened"

    def __len__(self):
        return 4

    def read(self, index):
        raise Rejected("broken_json")

    def key(self, index):
        return str(index)

    def close(self):
        pass


def test_the_next_shard_is_opened_while_one_is_read():
    shards = Shards()
    cache = ShardCache(shards.open, 8, Retry(0))
    deal = Deal("s", tuple(f"{n}.tar" for n in range(6)), 2, seed=0, epochs=1)
    reader, rejects = SourceReader(0, deal, 1, cache), []

    def rejected(reject):
        if not rejects or rejects[-1] != reject.shard:
            rejects.append(reject.shard)
            unit = deal.unit(1, len(rejects))
            if unit is not None:  # the first record of a shard was just read
                shards.wait_for(deal.shards[unit.shard])

    assert not list(reader.records(rejected, lambda source: None))
    assert len(rejects) == 3 and rejects == [deal.shards[deal.unit(1, n).shard] for n in range(3)]
    assert all(shards.opened[path].startswith("open") for path in rejects[1:]), "by threads"
    cache.close()


def test_the_first_shards_of_all_slots_are_opened_at_one_time(tmp_path, monkeypatch):
    write_captions(tmp_path / "data" / "captions", shards=6, records=4)
    job = make_job(tmp_path / "data", tmp_path / "out", global_batch_size=6)
    job.data.sources = job.data.sources[:1]
    setup = make_setup(job, Characters(), "train", 6)
    meeting = threading.Barrier(6)

    def open_shard(source, path):
        meeting.wait(WAIT_S)  # nobody goes on before six are being opened
        return setup.open_shard(source, path)

    monkeypatch.setattr(producer_module, "ShardCache", lambda _, *rest: ShardCache(open_shard, *rest))
    producer = Producer(setup, range(6), {})
    for slot in producer.slots:
        producer.cache.use(0, setup.deals[0].shards[slot.readers[0].deal.unit(slot.number, 0).shard], len)
    producer.close()


def test_where_a_run_goes_on_the_shards_of_samples_that_wait_are_opened_at_one_time(tmp_path):
    loader = Loader(make_job(write_all(tmp_path / "data"), tmp_path / "out"), Characters())
    for _ in range(12):
        next(loader)
    states, setup = dict(loader.states), loader.setup
    loader.close()
    asked: list[tuple[int, str]] = []
    cache = ShardCache(setup.open_shard, 1, Retry(0))
    cache.ahead = lambda source, path: asked.append((source, path))  # type: ignore[method-assign]
    for number, state in states.items():
        slot = Slot(number, setup, cache)
        slot.open_ahead(state["plan"])
        places = [(source, unit) for source, unit, *_ in state["plan"]["waiting"]]
        places += [(source, unit) for source, (unit, *_) in enumerate(state["plan"]["readers"])]
        deals = setup.deals
        shards = {(source, deals[source].shards[deals[source].unit(number, n).shard]) for source, n in places}
        assert len(shards) > 3 and set(asked) == shards
        asked.clear()


@pytest.mark.parametrize("bad", ["missing", "broken"])
def test_a_bad_shard_that_was_opened_ahead_is_a_reject_once_an_epoch(tmp_path, bad):
    folder = tmp_path / "data"
    (folder / "captions").mkdir(parents=True)
    for number in range(4):
        members = [(f"{number}.jpg", jpeg()), (f"{number}.txt", b"A cat.")]
        write_tar(folder / "captions" / f"{number}.tar", members)
    job = make_job(folder, tmp_path / "out", epochs=1, local_batch_size=1)
    job.data.sources = job.data.sources[:1]
    job.data.sources[0].path = str(folder / "captions" / "{0..3}.tar")
    if bad == "broken":
        (folder / "captions" / "2.tar").write_bytes(b"no tar at all" * 100)
    else:
        (folder / "captions" / "2.tar").unlink()
    loader = Loader(job, Characters())
    samples = [sample.key for step in loader for batch in step.batches for sample in batch.samples]
    rejected = loader.report()["sources"]["captions"]["rejected"]
    loader.close()
    assert sorted(samples) == ["0", "1", "3"]
    (entry,) = rejected["shards"].values()
    assert entry["count"] == 1
