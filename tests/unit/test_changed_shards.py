"""Shards that change between kill and resume: the run goes on exactly, or one line names the shard."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from experiments.vlm.config import Data, Source
from experiments.vlm.data.loader import Loader
from experiments.vlm.data.sources.shards import open_shard
from tests.samples import jpeg, write_tar
from tests.tiny_data import Characters, make_job
from torchtitan.config.errors import ConfigError, DataError

RECORDS = 12
SAME = jpeg(32, 48)  # of one size, so that the order of samples changes no offset


def write_shard(folder: Path, number: int, kind: str, names: list[str] | None = None) -> list[str]:
    """A shard of captions: the names of its samples, all as long."""
    names = names or [f"{number:02d}-{record:03d}" for record in range(RECORDS)]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"shard-{number}.{kind}"
    if kind == "tar":
        write_tar(path, [m for n in names for m in ((f"{n}.jpg", SAME), (f"{n}.txt", f"{n} a cat".encode()))])
    else:
        path.write_text("".join(json.dumps({"text": f"{name} a dog and a cat"}) + "\n" for name in names))
    os.utime(path, ns=(1, 1))  # the time of writing tells nothing
    return names


def job_of(folder: Path, dump: Path, kind: str, **options):
    job = make_job(folder, dump, packing_buffer_size=4, patches_per_row=64, seq_len=64, **options)
    format = {"tar": "cc12m", "jsonl": "text"}[kind]
    job.data.sources = [Source(name="source", format=format, path=str(folder), shuffle_buffer=4)]
    return job


def names_in(step) -> list[str]:
    names = []
    for batch in step.batches:
        for row in batch.tensors["tokens"].tolist():
            names += re.findall(r"\d\d-\d\d\d", bytes(token for token in row if token < 256).decode())
    return names


def agree(has_data: bool | None, error: Exception | None = None) -> bool:
    if error:
        raise error
    return bool(has_data)


def run(job, steps: int, state=None, ranks: int = 1) -> tuple[Counter, dict, list[list[str]]]:
    """Names of samples by how often they came, the state afterwards, and the names of each step in order."""
    loaders = [Loader(job, Characters(), rank=rank, ranks=ranks, agree=agree) for rank in range(ranks)]
    states, came = state or {}, []
    for loader in loaders:
        loader.load_state_dict(states)
    for _ in range(steps):
        taken = [step for loader in loaders if (step := next(loader, None))]
        if not taken:
            break
        came.append([name for step in taken for name in names_in(step)])
        states = {key: value for step in taken for key, value in step.state().items()}
    for loader in loaders:
        loader.close()
    return Counter(name for step in came for name in step), states, came


CHANGES = {
    "rewritten in another order": lambda folder, kind, names, n: write_shard(folder, n, kind, names[::-1]),
    "two samples swapped": lambda folder, kind, names, n: write_shard(
        folder, n, kind, [*names[:-2], names[-1], names[-2]]
    ),
    "appended": lambda folder, kind, names, n: write_shard(folder, n, kind, [*names, f"{n:02d}-999"]),
    "shrunk": lambda folder, kind, names, n: write_shard(folder, n, kind, names[:-1]),
    "other samples": lambda folder, kind, names, n: write_shard(
        folder, n, kind, [f"9{n}-{record:03d}" for record in range(RECORDS)]
    ),
}


@pytest.mark.parametrize("kind", ["tar", "jsonl"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_is_written_anew_is_refused_by_name_or_changes_nothing(tmp_path, kind, change):
    folder = tmp_path / "data"
    shards = [write_shard(folder, number, kind) for number in range(4)]
    job = job_of(folder, tmp_path / "out", kind, epochs=1)
    before, state, _ = run(job, steps=3)
    assert 0 < before.total() < 4 * RECORDS
    refused = 0
    for number, names in enumerate(shards):
        CHANGES[change](folder, kind, names, number)
        try:
            after, _, _ = run(job, 1000, state)
        except ConfigError as error:
            assert re.search(
                rf"shard \S*shard-{number}\.{kind} of source source has been written", str(error)
            )
            refused += 1
        else:
            assert set((before + after).values()) == {1}
        write_shard(folder, number, kind)
    assert refused >= 2, "the shards of both slots are in hand"
    after, _, _ = run(job, 1000, state)
    assert before + after == Counter(name for names in shards for name in names), "as it was, it goes on"


@pytest.mark.parametrize("kind", ["tar", "jsonl"])
def test_a_shard_that_is_written_anew_while_it_is_read_ends_the_run_once_it_is_opened_again(tmp_path, kind):
    folder, refused = tmp_path / "data", 0
    shards = [write_shard(folder, number, kind) for number in range(4)]
    for number, names in enumerate(shards):
        loader = Loader(job_of(folder, tmp_path / "out", kind, epochs=1), Characters())
        came = Counter(name for _ in range(3) for name in names_in(next(loader)))
        write_shard(folder, number, kind, names[::-1])
        loader.supply.forwards.producer.cache.kept.clear()  # as where many others were opened meanwhile
        try:
            came.update(name for step in loader for name in names_in(step))
        except DataError as error:
            assert re.search(rf"shard-{number}\.{kind} has been written anew .*: it holds other", str(error))
            refused += 1
        else:
            assert came == Counter(name for names in shards for name in names)
        loader.close()
        write_shard(folder, number, kind)
    assert refused >= 2, "the shards of both slots are in hand"


def test_a_part_of_a_shard_that_another_slot_has_read_counts_too(tmp_path):
    folder = tmp_path / "data"
    (names,) = [write_shard(folder, 0, "jsonl")]
    job = job_of(folder, tmp_path / "out", "jsonl", epochs=2)
    for steps in range(1, 100):
        came, state, _ = run(job, steps)
        if came == Counter(names * 2):
            break
        write_shard(folder, 0, "jsonl", names[::-1])
        with pytest.raises(ConfigError, match="holds other records"):
            run(job, 1, state)
        write_shard(folder, 0, "jsonl")
    assert steps > 5


def test_records_of_a_large_file_in_another_order_are_another_content(tmp_path):
    lines = [json.dumps({"text": "a" * (500 + number % 97)}) + "\n" for number in range(6000)]
    for name, order in (
        ("a", lines),
        ("b", lines),
        ("c", [*lines[:1000], *lines[1001:2500], lines[1000], *lines[2500:]]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(order))
    shards = [
        open_shard(str(tmp_path / f"{name}.jsonl"), Source(format="text"), Data(cache_folder=str(tmp_path)))
        for name in "abc"
    ]
    assert len({os.path.getsize(tmp_path / f"{name}.jsonl") for name in "abc"}) == 1
    assert shards[0].checksum == shards[1].checksum != shards[2].checksum


def test_what_was_changed_may_start_anew(tmp_path):
    folder = tmp_path / "data"
    names = write_shard(folder, 0, "tar")
    job = job_of(folder, tmp_path / "out", "tar", epochs=1)
    _, state, _ = run(job, 1)
    write_shard(folder, 0, "tar", names[::-1])
    job.data.resume_changed_data = True
    assert run(job, 1000, state)[0] == Counter(names)


def test_shards_that_lie_elsewhere_in_another_order_go_on_exactly(tmp_path):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for number in range(4):
        write_shard(folder, number, "tar")
        write_shard(elsewhere / str(9 - number), number, "tar")
    *_, straight = run(job_of(folder, tmp_path / "out", "tar"), 8)
    _, state, begun = run(job_of(folder, tmp_path / "out", "tar"), 3)
    *_, rest = run(job_of(elsewhere, tmp_path / "out", "tar"), 5, state)
    assert begun + rest == straight


@pytest.mark.parametrize(
    "change, told",
    [
        (
            lambda folder: (folder / "shard-1.tar").rename(folder / "shard-7.tar"),
            r"has lost 1 shard \(shard-1",
        ),
        (lambda folder: (folder / "shard-1.tar").unlink(), r"has lost 1 shard \(shard-1.tar\)"),
        (lambda folder: write_shard(folder, 7, "tar"), r"1 shard \(shard-7.tar\) more; data.join_new_shards"),
    ],
)
def test_another_list_of_shards_is_refused_by_name(tmp_path, change, told):
    folder = tmp_path / "data"
    for number in range(3):
        write_shard(folder, number, "tar")
    job = job_of(folder, tmp_path / "out", "tar")
    _, state, _ = run(job, 2)
    change(folder)
    with pytest.raises(ConfigError, match=told):
        run(job, 1, state)


@pytest.mark.parametrize("new", ["0-first", "shard-9"])
def test_new_shards_join_with_the_next_epoch_and_are_exact_from_there(tmp_path, new):
    folder = tmp_path / "data"
    old = [name for number in range(3) for name in write_shard(folder, number, "tar")]
    options = {"epochs": 4, "global_batch_size": 4, "local_batch_size": 2, "join_new_shards": True}
    job = job_of(folder, tmp_path / "out", "tar", **options)
    before, state, _ = run(job, 4)
    added = [name for number in (7, 8) for name in write_shard(tmp_path, number, "tar")]
    for number in (7, 8):
        (tmp_path / f"shard-{number}.tar").rename(folder / f"{new}{number}.tar")
    straight, _, rows = run(job, 1000, state)
    came = before + straight
    assert {came[name] for name in old} == {4}
    (times,) = {came[name] for name in added}
    assert 1 <= times <= 3, "the first epoch had begun"

    job.training.local_batch_size = 1
    resumed, rest = [], state
    for number, ranks in enumerate((2, 1, 4)):
        job.data.num_workers = int(ranks == 1)
        _, rest, steps = run(job, 9 if number < 2 else 1000, rest, ranks)
        resumed += steps
    assert [sorted(names) for names in resumed] == [sorted(names) for names in rows]


@pytest.mark.parametrize("workers", [0, 1])
def test_new_shards_join_a_run_that_goes_on_as_one_that_is_started_again(tmp_path, workers):
    folder = tmp_path / "data"
    old = [name for number in range(3) for name in write_shard(folder, number, "jsonl")]
    job = job_of(folder, tmp_path / "out", "jsonl", epochs=4, join_new_shards=True, new_shards_freq=4)
    job.data.num_workers = workers
    loader, steps = Loader(job, Characters(), agree=agree), []
    for step in loader:
        steps.append(names_in(step))
        if len(steps) == 4:
            state = step.state()
            added = write_shard(folder, 7, "jsonl")
    loader.close()
    came = Counter(name for step in steps for name in step)
    assert {came[name] for name in old} == {4} and 1 <= came[added[0]] <= 3
    assert run(job, 1000, state)[2] == steps[4:]


def test_a_run_does_not_look_for_new_shards_unless_it_is_asked_to(tmp_path):
    folder = tmp_path / "data"
    old = write_shard(folder, 0, "jsonl")
    job = job_of(folder, tmp_path / "out", "jsonl", epochs=4, join_new_shards=True, new_shards_freq=0)
    loader = Loader(job, Characters(), agree=agree)
    came = Counter(names_in(next(loader)))
    write_shard(folder, 7, "jsonl")
    for step in loader:
        came.update(names_in(step))
    loader.close()
    assert came == Counter(old * 4)


def test_shards_join_again_and_again(tmp_path):
    folder = tmp_path / "data"
    job = job_of(folder, tmp_path / "out", "jsonl", epochs=6, join_new_shards=True)
    shards = [write_shard(folder, number, "jsonl") for number in range(2)]
    came, state = Counter(), {}
    for number in range(2, 5):
        counted, state, _ = run(job, 5, state)
        came += counted
        shards.append(write_shard(folder, number, "jsonl"))
    came += run(job, 1000, state)[0]
    times = [{came[name] for name in names} for names in shards]
    assert times[:2] == [{6}, {6}] and all(len(of) == 1 for of in times)
    assert 6 > min(times[2]) >= min(times[3]) >= min(times[4]) > 0


def test_new_shards_that_come_in_the_last_epoch_stay_out(tmp_path):
    folder = tmp_path / "data"
    names = write_shard(folder, 0, "jsonl")
    job = job_of(folder, tmp_path / "out", "jsonl", epochs=1, join_new_shards=True)
    before, state, _ = run(job, 1)
    write_shard(folder, 1, "jsonl")
    assert before + run(job, 1000, state)[0] == Counter(names)
