"""The advisor simulates what the loader then does."""

import functools
import itertools
import math
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from experiments.commands import advise_packing, main
from experiments.commands.advise_packing import prices_of
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.costs import packing_advice
from experiments.vlm.costs.packing_advice import (
    Data,
    Deadline,
    Trials,
    best_of,
    next_lengths,
    read_documents,
    search,
)
from experiments.vlm.costs.packing_simulation import Case, Occupancy, Prices, Stream, simulate
from experiments.vlm.data.loader import Loader
from experiments.vlm.data.packing import Budget
from experiments.vlm.data.setup import make_setup
from experiments.vlm.spec import build_vlm
from experiments.vlm.view.advice_picture import draw_advice
from tests.tiny_data import Characters, make_job, write_all


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


def test_sizes_are_those_of_the_delivered_samples(data, tmp_path):
    job = make_job(data, tmp_path, epochs=1)
    documents = read_documents(make_setup(job, Characters(), "train", 1), limit=1000).documents
    assert len(documents) == 102
    loader = Loader(job, Characters())
    counts = [step.batches[0].counts for step in loader]
    loader.close()
    assert sum(tokens for document in documents for tokens, _ in document) == sum(
        count["tokens"] for count in counts
    )
    assert sum(patches for document in documents for _, patches in document) == sum(
        count["patches"] for count in counts
    )
    assert sum(patches > 0 for document in documents for _, patches in document) == sum(
        count["images"] for count in counts
    )


def test_the_simulation_is_what_the_loader_packs(data, tmp_path):
    """One slot, the same documents in the same order: the same rows."""
    job = make_job(data, tmp_path, local_batch_size=1)
    stream = read_documents(make_setup(job, Characters(), "train", 1), limit=400)
    seen = simulate(stream, Case(Budget(256, 1, 256), 16), merge=2, rows=120)
    loader = Loader(job, Characters())
    first = seen.rows // 3  # rows before those that are counted
    counts = [step.batches[0].counts for _, step in zip(range(first + seen.rows), loader, strict=False)][
        first:
    ]
    loader.close()
    assert np.mean([count["images"] for count in counts]) == pytest.approx(seen.images, abs=1e-9)
    assert np.mean([count["tokens"] for count in counts]) / 256 == pytest.approx(seen.tokens, abs=0.01)


def test_what_is_wasted_is_the_share_of_the_flops_that_padding_takes():
    seen = Occupancy(
        Budget(100, 2, 200), 16, rows=9, tokens=0.9, patches=0.5, plan_s=0, images=1, longest_wait=1
    )
    prices = Prices(token=10.0, patch=3.0)
    assert seen.wasted(prices) == pytest.approx((10 * 10 + 200 * 3) / (100 * 10 + 400 * 3))
    assert seen.cost(prices) == pytest.approx((100 * 10 + 400 * 3) / 90), "of 90 useful tokens"


def test_prices_are_the_flops_of_the_matrices_of_either_tower():
    job = VLMJobConfig()
    prices = prices_of(job, Characters())
    with torch.device("meta"):
        decoder = build_vlm(job, Characters()).decoder
    matrices = [module.weight.numel() for module in decoder.modules() if isinstance(module, torch.nn.Linear)]
    assert prices.token == 6 * sum(matrices), "forward, and backward for weights and inputs, 2 a parameter"
    job.training.freeze = ["encoder"]
    assert 0 < prices_of(job, Characters()).patch < prices.patch


def captions_and_chats() -> Stream:
    """Images of 36 to 144 patches, merge 6."""
    random, documents, sources = np.random.default_rng(0), [], []
    for number in range(600):
        sizes = 36 * random.integers(1, 5, 1 + number % 2)
        texts = random.integers(2, 40, len(sizes))
        documents.append(
            [
                part
                for text, size in zip(texts.tolist(), sizes.tolist(), strict=True)
                for part in picture(text, size)
            ]
        )
        sources.append(number % 2)
    return Stream(documents, sources, (1.0, 1.0))


def picture(text: int, patches: int) -> list[tuple[int, int]]:
    return [(text, 0), (patches // 36 + 2, patches)]


def large_pictures() -> Stream:
    """Half of them fill the shortest row that may be asked for: two share a long one alone."""
    random = np.random.default_rng(1)
    return Stream(
        [picture(int(random.integers(20, 100)), 36 if n % 2 else 144) for n in range(600)], [0] * 600
    )


@functools.cache
def everything_tried(make):
    """Every S and every L, of which search may ask for any."""
    stream, found = make(), {}
    for seq_len, length in product((64, 128), range(144, 1297, 36)):
        case = Case(Budget(seq_len, 1, length), 16)
        found[case] = simulate(stream, case, 6, rows=32)
    return stream, found


@pytest.mark.parametrize("patch_price", [0.02, 0.3, 5.0])
@pytest.mark.parametrize("make", [captions_and_chats, large_pictures])
def test_what_is_advised_costs_as_little_as_the_best_of_all_sizes(make, monkeypatch, patch_price):
    stream, found = everything_tried(make)
    asked = []
    monkeypatch.setattr(packing_advice, "simulate", lambda s, case, m: asked.append(case) or found[case])
    data = Data(stream, Prices(1.0, patch_price), merge=6, largest=144)
    seen = search(Trials(data, Deadline(math.inf)), [64, 128], [1], [16])
    least = min(map(data.cost, found.values()))
    assert data.cost(best_of(seen, data, 128, 16)) <= 1.004 * least
    assert len(asked) == len(set(asked)) < len(found) / 2


@pytest.mark.parametrize("length", [360, 720])
def test_few_rows_tell_what_many_do_though_what_waits_still_changes(length):
    """Patches bind in a row of 360, tokens in one of 720."""
    stream, case = captions_and_chats(), Case(Budget(128, 1, length), 64)
    few, many = (simulate(stream, case, 6, rows) for rows in (48, 300))
    assert (few.tokens, few.patches) == pytest.approx((many.tokens, many.patches), rel=0.02)


def test_a_dear_encoder_asks_for_a_shorter_row_than_a_cheap_one(monkeypatch):
    stream, found = everything_tried(captions_and_chats)
    monkeypatch.setattr(packing_advice, "simulate", lambda s, case, m: found[case])
    trials = [Trials(Data(stream, Prices(1.0, price), 6, 144), Deadline(math.inf)) for price in (5.0, 0.02)]
    (dear,), (cheap,) = (search(each, [128], [1], [16]) for each in trials)
    assert dear.budget.patches_per_row < cheap.budget.patches_per_row


@pytest.mark.parametrize("best", [64, 1000, 3000, 50_000])
def test_the_length_is_found_however_far_it_lies_from_where_the_search_begins(best):
    """The cost is a * L + b / L, which is least at sqrt(b / a)."""
    costs = {}
    wanted = [1000]
    while wanted:
        costs |= {length: length / best + best / length for length in wanted}
        wanted = next_lengths(costs, lambda patches: max(64, round(patches / 4) * 4))
    found = min(costs, key=costs.__getitem__)
    assert abs(math.log(found / best)) < math.log(1.03) and len(costs) < 40


def test_where_the_time_is_over_the_answer_is_from_what_was_tried(data, tmp_path):
    job = make_job(data, tmp_path)
    deadline = Deadline(5.0, clock=itertools.count().__next__)
    setup = make_setup(job, Characters(), "train", 1)
    stream = read_documents(setup, limit=1000, deadline=deadline.share(0.5))
    assert 1 <= len(stream.documents) < 10
    trials = Trials(Data(stream, Prices(1.0, 0.3), 2, 64), Deadline(3.0, clock=itertools.count().__next__))
    seen = search(trials, [128, 256], [1], [16, 64])
    assert seen and len(trials.seen) < 8 and {each.buffer for each in seen} == {16}


def test_where_the_time_is_over_no_process_has_taken_more_than_it_tries(monkeypatch):
    taken: list[Case] = []

    class Pool(ThreadPoolExecutor):
        def submit(self, call, case):
            taken.append(case)
            return super().submit(simulate, data.stream, case, data.merge)

    monkeypatch.setattr(packing_advice, "start_pool", lambda processes, data: Pool(processes))
    data = Data(Stream([[(20, 0), (27, 100)]], [0]), Prices(1.0, 0.3), 2, 100)
    with closing(Trials(data, Deadline(0.0), 2)) as trials:
        assert not trials.run([Case(Budget(256, 1, length), 16) for length in range(100, 140, 4)])
    assert len(taken) == 2 and len(trials.seen) == 1


def test_the_job_as_it_is_is_tried_however_little_time_there_is_and_whoever_ends_first():
    class Backwards(Trials):
        def _occupancies(self, cases):
            yield from super()._occupancies(cases[::-1])

    stream, job = Stream([[(20, 0), (27, 100)], [(63, 0)]], [0, 0]), Case(Budget(256, 1, 600), 16)
    trials = Backwards(Data(stream, Prices(1.0, 0.3), 2, 100), Deadline(0.0))
    assert search(trials, [256], [1], [16], job)[0].budget == job.budget


def test_processes_find_what_one_finds():
    data = Data(Stream([[(20, 0), (27, 100)], [(63, 0)]], [0, 0]), Prices(1.0, 0.3), 2, 100)
    cases = [Case(Budget(256, 1, length), 16) for length in (100, 200)]
    with (
        closing(Trials(data, Deadline(math.inf))) as one,
        closing(Trials(data, Deadline(math.inf), 2)) as two,
    ):
        assert one.run(cases) and two.run(cases)
    for case in cases:
        assert replace(one.seen[case], plan_s=0.0) == replace(two.seen[case], plan_s=0.0)


def test_the_picture_shows_what_was_counted(tmp_path, figures):
    documents = [[(20, 0), (27, 100)], [(63, 0)]] * 400
    stream = Stream(documents, [0] * 800)
    seen = [simulate(stream, Case(Budget(256, 1, 512), buffer), 2, rows=40) for buffer in (32, 64)]
    draw_advice(documents, seen, str(tmp_path / "advice.png"))
    assert (tmp_path / "advice.png").is_file()
    [figure] = figures
    assert figure.get_suptitle() == "800 documents, 400 images, 0.909 patches per token"
    tokens, images, ratios, padding = figure.axes
    counted = [sum(bar.get_height() for bar in axes.patches) for axes in (tokens, images, ratios)]
    assert counted == [800, 400, 800]
    assert tokens.get_title() == "median 55, 95 % up to 63, largest 63"
    bars = [[bar.get_height() for bar in kind] for kind in padding.containers]
    assert bars == [[100 * (1 - o.tokens) for o in seen], [100 * (1 - o.patches) for o in seen]]


def test_the_command_prints_lines_for_the_toml_and_tells_how_far_it_is(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(advise_packing, "available_cores", lambda: 1)
    monkeypatch.setattr(packing_advice, "simulate", functools.partial(simulate, rows=32))
    toml = tmp_path / "job.toml"
    sources = "".join(
        f'[[data.sources]]\nname = "{s.name}"\nformat = "{s.format}"\npath = "{s.path}"\n'
        for s in make_job(data, tmp_path).data.sources
    )
    toml.write_text(
        f"[training]\nseq_len = 256\n[data]\nmax_patches_per_image = 64\npacking_buffer_size = 16\n{sources}"
    )
    options = ["--samples", "100", "--seq_lens", "256", "--buffers", "16", "64", "--seconds", "0"]
    assert main(["advise", "--job.config_file", str(toml), *options]) == 0
    told = capsys.readouterr()
    advice = tomllib.loads(told.out[told.out.index("[training]") :])
    assert advice["training"] == {"seq_len": 256} and advice["data"]["patches_per_row"] % 4 == 0
    assert told.out.count("\n   ") == 4 and "the job" in told.out and "<- best" in told.out
    assert "reading: 1 of up to 100 documents" in told.err


@pytest.mark.parametrize(
    ("command", "options", "named"),
    [
        ("advise", ["--buffers", "16", "0"], "--buffers 16 0"),
        ("advise", ["--seq_lens", "4096", "8"], "--seq_lens 4096 8"),
        ("advise", ["--training.seq_len", "8"], "--seq_lens is missing"),
        ("advise", ["--samples", "0"], "--samples 0"),
        ("advise", ["--seconds", "-1"], "--seconds -1.0"),
        ("advise", ["--out", "nowhere/advice.png"], "--out = nowhere/advice.png"),
        ("inspect", ["--out", "nowhere/report.html"], "--out = nowhere/report.html"),
        ("inspect", ["--keys", "nowhere/keys.jsonl"], "--keys = nowhere/keys.jsonl"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_read(data, capsys, command, options, named):
    source = ["--training.dataset", "text", "--training.dataset_path", str(data / "texts")]
    assert main([command, *options, *source]) == 2
    assert f"error: {named}: " in capsys.readouterr().err
