"""How long a step's tensors hold, how much memory there is for them, and what the threads that pin them for a
GPU change: nothing but that.
"""

import os
import signal
import threading

import pytest
import torch
from torchdata.nodes import Mapper, Prefetcher

from experiments.vlm.data import prefetch
from experiments.vlm.data import workers as worker_module
from experiments.vlm.data.loader import Loader
from experiments.vlm.data.workers import Worker
from tests.tiny_data import Characters, Stumbling, make_job, write_all
from torchtitan.config.errors import StorageError

STEPS = 6
WORKERS = [{"num_workers": 0}, {"num_workers": 2, "prefetch": 1}, {"num_workers": 2, "prefetch": 3}]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


def copied(given):
    if isinstance(given, Exception):
        return given
    tensors, steps = given
    return {name: tensor.clone() for name, tensor in tensors.items()}, steps


@pytest.fixture
def pinned(monkeypatch):
    """As on a GPU, but the copies are not in pinned memory.

    A thread that is one step ahead makes them, as PinMemory's.
    """
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(
        "experiments.vlm.data.prefetch.PinMemory",
        lambda steps, device, snapshot_frequency: Prefetcher(Mapper(steps, copied), 1, snapshot_frequency),
    )


def open_loader(data, dump, **options) -> Loader:
    return Loader(make_job(data, dump, **options), Characters())


def contents(step) -> list[bytes]:
    return [tensor.numpy().tobytes() for batch in step.batches for tensor in batch.tensors.values()]


@pytest.fixture
def expected(data, tmp_path) -> list[list[bytes]]:
    loader = open_loader(data, tmp_path)
    steps = [contents(next(loader)) for _ in range(STEPS)]
    loader.close()
    return steps


def joined(batches) -> dict[str, bytes]:
    """Each field of them, one after the other."""
    parts: dict[str, list[bytes]] = {}
    for batch in batches:
        for name, tensor in batch.tensors.items():
            parts.setdefault(name, []).append(tensor.numpy().tobytes())
    return {name: b"".join(pieces) for name, pieces in parts.items()}


@pytest.fixture(scope="module")
def in_one_forward(data, tmp_path_factory) -> list[dict[str, bytes]]:
    """Steps of four slots."""
    loader = open_loader(data, tmp_path_factory.mktemp("one"), local_batch_size=4, global_batch_size=4)
    steps = [joined(next(loader).batches) for _ in range(STEPS)]
    loader.close()
    return steps


@pytest.mark.parametrize("options", WORKERS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_step_holds_until_the_next_and_its_batches_may_go_before(
    data, tmp_path, in_one_forward, options, size
):
    loader = open_loader(data, tmp_path, local_batch_size=size, global_batch_size=4, **options)
    before = None
    for number in range(STEPS):
        step = next(loader)
        if before is not None:
            list(before.once())  # too late: it frees nothing
        assert joined(step.batches) == in_one_forward[number]
        if number % 2:
            assert joined(step.once()) == in_one_forward[number]
        before = step
    loader.close()


def test_there_is_memory_for_a_step_and_what_workers_are_ahead(data, tmp_path):
    """Before, there was memory for four steps of as many forwards."""
    loader = open_loader(data, tmp_path, local_batch_size=1, global_batch_size=8, num_workers=2, prefetch=2)
    step = next(loader)
    forwards = loader.supply.forwards
    memory = sum(array.nbytes for arrays in forwards.buffers.arrays for array in arrays.values())
    slot = sum(tensor.nbytes for tensor in step.batches[0].tensors.values())
    assert memory == (8 + 2 * 2) * slot
    asked = forwards.asked
    for number, _ in enumerate(step.once()):
        assert forwards.asked == asked + number  # workers go on while the step is used
    loader.close()


@pytest.mark.parametrize("options", WORKERS)
def test_pinned_steps_hold_however_many_are_kept(data, tmp_path, expected, pinned, options):
    loader = open_loader(data, tmp_path, **options)
    kept = [next(loader) for _ in range(STEPS)]
    loader.close()
    assert [contents(step) for step in kept] == expected


@pytest.mark.parametrize("options", WORKERS)
def test_pinned_steps_have_the_state_right_after_them(data, tmp_path, expected, pinned, options):
    loader = open_loader(data, tmp_path, **options)
    state = [next(loader) for _ in range(3)][-1].state()
    loader.close()
    loader = open_loader(data, tmp_path, **options)
    loader.load_state_dict(state)
    assert [contents(next(loader)) for _ in range(3)] == expected[3:]
    loader.close()


def test_an_error_beside_training_is_raised_as_it_was(data, tmp_path, pinned):
    loader = Loader(make_job(data, tmp_path), Stumbling())
    with pytest.raises(ZeroDivisionError) as caught:
        for _ in range(50):
            next(loader)
    loader.close()
    assert str(caught.value) == "in the tokenizer"


def test_a_worker_killed_beside_training_is_told_as_it_was(data, tmp_path, pinned):
    loader = open_loader(data, tmp_path, num_workers=2)
    next(loader)
    os.kill(loader.supply.forwards.workers[1].process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"^data worker 1 \(slots 1\) was killed by SIGKILL"):
        for _ in range(10):
            next(loader)
    loader.close()


@pytest.mark.parametrize("options", WORKERS)
def test_closing_ends_the_threads(data, tmp_path, pinned, options):
    before = set(threading.enumerate())
    loader = open_loader(data, tmp_path, **options)
    next(loader)
    started = [thread for thread in threading.enumerate() if thread not in before]
    assert started
    loader.close()
    for thread in started:
        thread.join()


def test_stopping_does_not_wait_for_a_worker_that_stands_still(data, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module, "GRACE_S", 0.1)
    waits, answer = threading.Event(), Worker.answer

    def seen(worker):
        if not worker.pipe.poll():
            waits.set()
        return answer(worker)

    loader = open_loader(data, tmp_path, num_workers=1)
    next(loader)
    steps, ends = loader.supply.forwards, []
    os.kill(steps.workers[0].process.pid, signal.SIGSTOP)
    monkeypatch.setattr(Worker, "answer", seen)
    thread = threading.Thread(target=lambda: ends.append(next(g for g in steps if isinstance(g, Exception))))
    thread.start()
    waits.wait()
    steps.stop()
    thread.join()
    loader.close()
    assert isinstance(ends[0], RuntimeError) and next(steps, None) is None


def test_without_a_gpu_the_only_thread_is_the_one_that_waits_for_a_step(data, tmp_path):
    before = threading.active_count()
    loader = open_loader(data, tmp_path, num_workers=2)
    next(loader)
    assert threading.active_count() == before + 1
    loader.close()
    assert threading.active_count() == before


class Others:
    """The other ranks, which always have data; `waited`: how often this one said that it waits."""

    def __init__(self):
        self.waited, self.errors = 0, []

    def agree(self, has_data, error=None):
        self.waited += has_data is None
        if error is not None:
            self.errors.append(error)
            raise error
        return True


@pytest.mark.parametrize("workers", [0, 1])
def test_a_rank_whose_data_take_long_says_so_and_gives_the_same_steps(data, tmp_path, monkeypatch, workers):
    loader = open_loader(data, tmp_path, num_workers=workers)
    expected = [contents(next(loader)) for _ in range(3)]
    loader.close()
    monkeypatch.setattr(prefetch, "STILL_WAITING_S", 0.0)
    others = Others()
    job = make_job(data, tmp_path, num_workers=workers)
    loader = Loader(job, Characters(), agree=others.agree)
    assert [contents(next(loader)) for _ in range(3)] == expected and others.waited
    loader.close()


def test_a_read_that_hangs_is_an_error_where_other_ranks_wait(data, tmp_path, monkeypatch):
    goes_on = threading.Event()
    monkeypatch.setattr(prefetch, "STILL_WAITING_S", 0.01)
    monkeypatch.setattr(prefetch.InProcess, "fill", lambda self, arrays: goes_on.wait() and [])
    job = make_job(data, tmp_path, storage_timeout_s=0.0)
    job.comm.train_timeout_seconds = 0
    others = Others()
    loader = Loader(job, Characters(), agree=others.agree)
    with pytest.raises(StorageError, match="no data for 0 s, and no error either"):
        next(loader)
    assert len(others.errors) == 1, "all ranks hear of it"
    loader.close()
    goes_on.set()
