"""What the loader delivers depends on the data and the configuration alone, and every sample comes exactly as
often as asked.
"""

import hashlib
import json
from collections import Counter

import pytest
import torch
import torchdata.nodes
from torchdata.nodes.types import Stateful

from experiments.vlm.config import Source
from experiments.vlm.data.loader import Loader, Step
from tests.reference import small_run  # noqa: F401 (its flavors)
from tests.tiny_data import Characters, make_job, write_all

STEPS = 6
WEIGHTS = {"captions": 2.0, "documents": 1.0, "texts": 0.5}
Hashes = list[dict[int, str]]  # for each step: slot -> hash of all its tensors


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


def open_loader(
    data, dump, rank=0, ranks=1, split="train", control=None, flavor="debugmodel", **options
) -> Loader:
    job = make_job(data, dump, **options)
    job.model.flavor = flavor
    return Loader(job, Characters(), rank=rank, ranks=ranks, split=split, control=control)


def slot_hashes(loader: Loader, step: Step) -> dict[int, str]:
    hashes = {}
    for number, batch in enumerate(step.batches):
        size = len(batch.tensors["tokens"])
        for row in range(size):
            digest = hashlib.sha256()
            for name, tensor in batch.tensors.items():
                rows = len(tensor) // size
                digest.update(name.encode() + tensor[row * rows : (row + 1) * rows].numpy().tobytes())
            hashes[loader.slots[number * size + row]] = digest.hexdigest()
    return hashes


def run(loader: Loader, steps: int = STEPS) -> Hashes:
    try:
        return [slot_hashes(loader, step) for _, step in zip(range(steps), loader, strict=False)]
    finally:
        loader.close()


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory) -> Hashes:
    hashes = run(open_loader(data, tmp_path_factory.mktemp("one"), global_batch_size=8))
    assert len(hashes) == STEPS and all(len(set(step.values())) == 8 for step in hashes)
    return hashes


@pytest.mark.parametrize("ranks, local", [(2, 2), (4, 2), (8, 1), (1, 8), (1, 1)])
def test_batches_do_not_depend_on_ranks_or_microbatches(data, expected, tmp_path, ranks, local):
    parts = [
        run(open_loader(data, tmp_path, rank, ranks, global_batch_size=8, local_batch_size=local))
        for rank in range(ranks)
    ]
    assert [
        {slot: digest for part in parts for slot, digest in part[step].items()} for step in range(STEPS)
    ] == expected


@pytest.mark.parametrize(
    "options",
    [{"num_workers": 1}, {"num_workers": 3, "prefetch": 3, "decode_threads": 2}, {"decode_threads": 3}],
)
def test_batches_do_not_depend_on_workers_and_threads(data, expected, tmp_path, options):
    assert run(open_loader(data, tmp_path, global_batch_size=8, **options)) == expected


def killed_again_and_again(data, tmp_path, **options) -> Hashes:
    """1 -> 4 -> 2 -> 8 -> 1 ranks; each time the last step's state is used though the loader was ahead."""
    state: dict[str, bytes] = {}
    seen: Hashes = []
    for ranks, steps in ((1, 1), (4, 2), (2, 1), (8, 1), (1, 1)):
        parts, states = [], {}
        for rank in range(ranks):
            loader = open_loader(
                data, tmp_path, rank, ranks, global_batch_size=8, local_batch_size=1, **options
            )
            loader.load_state_dict({key: state[key] for key in loader.slot_keys()} if state else {})
            taken = [
                (slot_hashes(loader, step), step.state) for _, step in zip(range(steps), loader, strict=False)
            ]
            next(loader)  # one that the trainer never used
            loader.close()
            parts.append([hashes for hashes, _ in taken])
            states |= taken[-1][1]()
        seen += [
            {slot: digest for part in parts for slot, digest in part[step].items()} for step in range(steps)
        ]
        state = states
    return seen


def test_a_run_killed_again_and_again_at_other_sizes_is_exact(data, expected, tmp_path):
    assert killed_again_and_again(data, tmp_path) == expected


TILED = {"flavor": "small-onevision", "seq_len": 512, "patches_per_row": 96, "patch_rows": 4}


@pytest.mark.parametrize("options", [{"num_workers": 1}, {"ranks": 2, "local_batch_size": 1}])
def test_nor_do_batches_of_tiles_and_their_taps(data, tmp_path, options):
    whole = open_loader(data, tmp_path, global_batch_size=2, local_batch_size=2, **TILED)
    tensors = next(whole).batches[0].tensors
    assert (tensors["visual_taps"] >= 0).sum() > 400 and tensors["tap_weights"].dtype == torch.float32
    whole.close()
    one = run(open_loader(data, tmp_path, global_batch_size=2, local_batch_size=2, **TILED), 3)
    given = {"local_batch_size": 2} | options
    parts = [
        run(open_loader(data, tmp_path, rank, global_batch_size=2, **TILED | given), 3)
        for rank in range(options.get("ranks", 1))
    ]
    assert [{k: v for part in parts for k, v in part[step].items()} for step in range(3)] == one


@pytest.mark.parametrize(
    "options",
    [{"flavor": "llava-debug", "patches_per_row": 195}, TILED],
    ids=["padded, class token", "tiles"],
)
def test_so_is_one_whose_images_are_squares(data, tmp_path, options):
    expected = run(open_loader(data, tmp_path, global_batch_size=8, **options))
    assert all(len(set(step.values())) == 8 for step in expected)
    assert killed_again_and_again(data, tmp_path, **options) == expected


def test_a_run_with_workers_resumes_without_them(data, expected, tmp_path):
    loader = open_loader(data, tmp_path, global_batch_size=8, num_workers=2)
    first = [slot_hashes(loader, next(loader)) for _ in range(3)]
    state = loader.state_dict()
    loader.close()
    loader = open_loader(data, tmp_path, global_batch_size=8)
    loader.load_state_dict(state)
    assert first + run(loader, 3) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_stays_what_it_was_while_the_loader_goes_on(data, tmp_path, workers):
    loader = open_loader(data, tmp_path, num_workers=workers)
    states, at_once = [], []
    for _ in range(6):
        states.append(next(loader).state)
        at_once.append(states[-1]())
    assert [state() for state in states] == at_once
    loader.load_state_dict(at_once[1])
    resumed_from = loader.state_dict()
    kept = dict(loader.states)
    texts = {slot: json.dumps(state) for slot, state in kept.items()}
    for _ in range(3):
        next(loader)
    assert resumed_from == at_once[1] and {slot: json.dumps(state) for slot, state in kept.items()} == texts
    loader.close()


def test_a_loader_is_stateful_for_torchdata(data, expected, tmp_path):
    """torchdata saves and restores what is inside its nodes by this protocol alone."""

    def open_nodes() -> tuple[Loader, torchdata.nodes.Loader]:
        loader = open_loader(data, tmp_path, global_batch_size=8)
        assert isinstance(loader, Stateful)
        return loader, torchdata.nodes.Loader(torchdata.nodes.IterableWrapper(loader))

    loader, nodes = open_nodes()
    first = [slot_hashes(loader, step) for _, step in zip(range(3), nodes, strict=False)]
    state = nodes.state_dict()
    loader.close()
    loader, nodes = open_nodes()
    nodes.load_state_dict(state)
    rest = [slot_hashes(loader, step) for _, step in zip(range(3), nodes, strict=False)]
    loader.close()
    assert first + rest == expected


def test_the_state_is_small_and_holds_no_pixels(data, tmp_path):
    loader = open_loader(data, tmp_path, packing_buffer_size=256)
    for _ in range(8):
        next(loader)
    assert all(len(piece) < 8000 for piece in loader.state_dict().values())
    loader.close()


def all_steps(loader: Loader) -> list[Step]:
    steps = list(loader)
    loader.close()
    return steps


def delivered(steps: list[Step]) -> Counter:
    return Counter(
        (sample.source, sample.shard, sample.key, sample.offset)
        for step in steps
        for batch in step.batches
        for sample in batch.samples
    )


@pytest.mark.parametrize("epochs, slots", [(1, 2), (1, 16), (3, 4)])
def test_every_sample_is_delivered_as_often_as_epochs_say(data, tmp_path, epochs, slots):
    steps = all_steps(open_loader(data, tmp_path, epochs=epochs, global_batch_size=slots))
    seen = delivered(steps)
    # cuts fall elsewhere in each epoch
    begun = Counter({sample: count for sample, count in seen.items() if sample[3] == 0})
    assert set(begun.values()) == {epochs}
    assert Counter(source for source, _, _, _ in begun) == {"captions": 60, "documents": 30, "texts": 12}
    assert any(offset > 0 for _, _, _, offset in seen), "no document was long enough to be cut"


def test_pieces_of_a_document_follow_each_other_without_a_gap(data, tmp_path):
    delivered_so_far: Counter = Counter()
    loader = open_loader(data, tmp_path, epochs=1)
    for step in loader:
        (batch,) = step.batches
        for sample in sorted(batch.samples, key=lambda sample: (sample.row, sample.document)):
            name = sample.shard, sample.key
            assert sample.offset == delivered_so_far[name]
            delivered_so_far[name] += int(
                (batch.tensors["document_ids"][sample.row] == sample.document).sum()
            )
    loader.close()


def test_a_book_by_itself_fills_its_rows_and_resumes_inside(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"{number:09d} " for number in range(600)).strip() + "\n")

    def open_book() -> Loader:
        job = make_job(tmp_path, tmp_path / "out", epochs=1, local_batch_size=1)
        job.data.sources = [Source(name="book", format="text", path=str(tmp_path / "book.txt"))]
        return Loader(job, Characters())

    steps = all_steps(open_book())
    lengths = [step.batches[0].counts["tokens"] for step in steps]
    offsets = [sample.offset for step in steps for sample in step.batches[0].samples]
    assert offsets == [sum(lengths[:number]) for number in range(len(steps))]
    assert all(length == 256 for length in lengths[:-2])
    first, second = open_book(), open_book()
    for _ in range(5):
        state = next(first).state()
    second.load_state_dict(state)
    assert run(second, 100) == [slot_hashes(first, step) for step in first]
    first.close()


def test_a_source_without_repeat_ends_and_the_others_go_on(data, tmp_path):
    loader = open_loader(data, tmp_path)
    loader.job.data.sources[2].repeat = False
    loader = Loader(loader.job, Characters())
    seen = delivered([step for _, step in zip(range(60), loader, strict=False)])
    assert sum(count for (source, *_, piece), count in seen.items() if source == "texts" and piece == 0) == 12
    assert max(count for (source, *_), count in seen.items() if source == "captions") > 1
    loader.close()


@pytest.mark.parametrize("weight_by", ["samples", "tokens"])
def test_the_mixture_is_as_weighted(data, tmp_path, weight_by):
    loader = open_loader(data, tmp_path, weight_by=weight_by)
    counts: Counter = Counter()
    for _, step in zip(range(150), loader, strict=False):
        counts.update(step.batches[0].counts)
    report = loader.report()["sources"]
    loader.close()
    total = sum(counts[f"{weight_by}/{name}"] for name in WEIGHTS)
    for name, weight in WEIGHTS.items():
        assert counts[f"{weight_by}/{name}"] / total == pytest.approx(
            weight / sum(WEIGHTS.values()), abs=0.03
        )
        assert counts[f"{weight_by}/{name}"] == report[name]["counts"][weight_by]


def test_ranks_that_run_dry_give_padding_until_all_have(data, tmp_path):
    """Several ranks in lockstep, agreeing as an all-reduce would: all stop with the same step."""
    loaders = [open_loader(data, tmp_path, rank, 8, epochs=1, local_batch_size=1) for rank in range(8)]
    seen: Counter = Counter()
    some_dry = False
    while True:
        steps = [next(loader) for loader in loaders]
        have_data = [step.batches[0].counts["tokens"] > 0 for step in steps]
        if not any(have_data):
            break
        some_dry |= not all(have_data)
        seen += delivered(steps)
    assert some_dry
    assert set(seen.values()) == {1} and len({key for _, _, key, piece in seen if piece == 0}) > 60
    for loader in loaders:
        loader.close()


def test_agreement_ends_a_rank_that_still_has_data_elsewhere(data, tmp_path):
    asked = []

    def agree(has_data: bool) -> bool:
        asked.append(has_data)
        return len(asked) != 4

    job = make_job(data, tmp_path, epochs=1, local_batch_size=1)
    loader = Loader(job, Characters(), rank=0, ranks=4, agree=agree)
    assert len(all_steps(loader)) == 3 and len(asked) == 4, "once a step, and at the end"


def test_validation_reads_its_split_once(data, tmp_path):
    job = make_job(data, tmp_path)
    job.validation.sources = job.data.sources
    found = []
    for workers in (0, 2):
        job.data.num_workers = workers
        validation = Loader(job, Characters(), split="validation")
        steps = [(slot_hashes(validation, step), delivered([step])) for step in validation]
        validation.close()
        assert next(validation, None) is None
        assert sum((seen for _, seen in steps), Counter()).most_common(1)[0][1] == 1
        found.append([hashes for hashes, _ in steps])
    assert found[0] == found[1] and len(found[0]) > 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_has_begun_goes_on_from_another_state(data, tmp_path, workers):
    loader = open_loader(data, tmp_path, num_workers=workers)
    state = next(loader).state()
    expected = [slot_hashes(loader, next(loader)) for _ in range(2)]
    loader.load_state_dict(state)
    assert run(loader, 2) == expected
