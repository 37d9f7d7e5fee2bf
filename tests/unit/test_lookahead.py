"""Slots over time: nothing lost, pieces in order, full on the side that binds,
and sources at their weights.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.vlm.data.lookahead import LookAhead, Queued, Taken
from experiments.vlm.data.packing import Budget, place
from experiments.vlm.data.sources.mixture import Mixture
from experiments.vlm.data.split import Splitter, outline_of

Parts = list[tuple[int, int]]  # (tokens, patches) of each part; patches 0: text

text = st.integers(1, 900).map(lambda tokens: (tokens, 0))
image = st.integers(1, 62).map(lambda visual: (visual + 2, 4 * visual))
documents = st.lists(st.lists(st.one_of(text, image), min_size=1, max_size=6), min_size=1, max_size=30)


def all_slots(stream: list[Parts], budget: Budget, size: int) -> list[list[Taken[int]]]:
    splitter = Splitter(budget, merge_size=2)
    look_ahead: LookAhead[int] = LookAhead(splitter, size, Mixture([1.0], 0, 0))
    numbered = iter(enumerate(map(outline_of, stream)))

    def draw() -> Queued[int] | None:
        number, outline = next(numbered, (-1, None))
        return None if outline is None else Queued(number, outline, 0, splitter)

    slots = []
    look_ahead.refill(draw)
    while look_ahead.entries:
        slots.append(look_ahead.take())
        look_ahead.refill(draw)
    return slots


@settings(max_examples=80, deadline=None)
@given(documents, st.integers(1, 2), st.sampled_from([64, 256, 1000]), st.integers(1, 20))
def test_every_token_leaves_once_and_in_order(stream, rows, patches, size):
    budget = Budget(256, rows, max(248, patches // rows))
    slots = all_slots(stream, budget, size)
    delivered: Counter = Counter()
    for slot in slots:
        images = [patches for taken in slot for patches in taken.queued.images(taken.end)]
        assert sum(taken.end - taken.queued.start for taken in slot) <= budget.seq_len
        assert [spot for taken in slot for spot in taken.places] == place(images, budget)
        for taken in slot:
            assert taken.queued.start == delivered[taken.queued.payload] < taken.end
            delivered[taken.queued.payload] = taken.end
    assert delivered == {number: sum(tokens for tokens, _ in parts) for number, parts in enumerate(stream)}


@settings(max_examples=40, deadline=None)
@given(documents, st.integers(1, 20))
def test_the_oldest_always_leaves(stream, size):
    budget = Budget(256, 1, 512)
    splitter, mixture = Splitter(budget, merge_size=2), Mixture([1.0], 0, 0)
    look_ahead: LookAhead[int] = LookAhead(splitter, size, mixture)
    look_ahead.entries = [
        Queued(number, outline_of(parts), 0, splitter) for number, parts in enumerate(stream)
    ]
    while look_ahead.entries:
        oldest = look_ahead.entries[0]
        assert oldest in [taken.queued for taken in look_ahead.take()]


# Sizes of several kinds of data, far from any that constants were tuned on: uniform where real ones have long
# tails.
def words(random: np.random.Generator, low: int, high: int) -> tuple[int, int]:
    return int(random.integers(low, high)), 0


def picture(random: np.random.Generator, largest: int) -> tuple[int, int]:
    visual = int(random.integers(16, largest // 4 + 1))
    return visual + 2, 4 * visual


KINDS: dict[str, Callable[[np.random.Generator, int], Parts]] = {
    "text": lambda random, largest: [words(random, 20, 1600)],
    "few images": lambda random, largest: [
        part for _ in range(2) for part in (words(random, 100, 1500), picture(random, largest))
    ],
    "many images": lambda random, largest: [
        part
        for _ in range(random.integers(4, 20))
        for part in (words(random, 5, 80), picture(random, largest))
    ],
    "book": lambda random, largest: [words(random, 9_000, 60_000)],
    "conversation": lambda random, largest: [
        picture(random, largest),
        *(words(random, 10, 90) for _ in range(random.integers(2, 8))),
    ],
    "caption": lambda random, largest: [picture(random, largest), words(random, 8, 60)],
}
DATA = {  # sources of each kind of data: kind -> share of the documents
    "text": {"text": 1.0},
    "few images": {"few images": 1.0},
    "many images": {"many images": 1.0},
    "books": {"book": 1.0},
    "conversations": {"conversation": 1.0},
    "books and captions": {"book": 0.02, "caption": 0.98},
    "captions and text": {"caption": 0.8, "text": 0.2},
    "everything": {"caption": 0.4, "few images": 0.2, "conversation": 0.3, "text": 0.1},
}


def stream_of(shares: dict[str, float], largest: int, seed: int = 0) -> Iterator[tuple[int, Parts]]:
    random, mixture = np.random.default_rng(seed), Mixture(list(shares.values()), seed, 0)
    while (source := mixture.pick()) is not None:
        mixture.give(source, 1)
        yield source, KINDS[list(shares)[source]](random, largest)


def run(shares: dict[str, float], seq_len: int, slots: int) -> tuple[list[list[Taken[None]]], Budget]:
    """Slots whose L is S times the patches per token of the data, as users are advised."""
    largest = min(1024, 2 * seq_len)
    sizes = np.array(
        [part for _, parts in itertools.islice(stream_of(shares, largest), 3000) for part in parts]
    ).sum(0)
    budget = Budget(seq_len, 1, max(largest, round(seq_len * sizes[1] / sizes[0] / 4) * 4))
    splitter = Splitter(budget, 2)
    mixture = Mixture(list(shares.values()), 0, 0)
    stream = stream_of(shares, largest)
    look_ahead: LookAhead[None] = LookAhead(splitter, 256, mixture)

    def draw() -> Queued[None]:
        source, parts = next(stream)
        mixture.give(source, 1)
        return Queued(None, outline_of(parts), source, splitter)

    taken = []
    for _ in range(slots):
        look_ahead.refill(draw)
        taken.append(look_ahead.take())
    return taken, budget


@pytest.mark.parametrize("seq_len", [512, 2048, 8192])
@pytest.mark.parametrize("data", list(DATA))
def test_slots_are_full_on_the_side_that_binds(data, seq_len):
    slots, budget = run(DATA[data], seq_len, 100 if seq_len < 8192 else 50)
    tokens = sum(taken.end - taken.queued.start for slot in slots for taken in slot) / (
        len(slots) * budget.seq_len
    )
    patches = sum(taken.queued.way(taken.end).patches for slot in slots for taken in slot) / (
        len(slots) * budget.patches
    )
    assert max(tokens, patches) >= 0.98


@pytest.mark.parametrize("seq_len", [2048, 8192])
@pytest.mark.parametrize("data", ["captions and text", "everything"])
def test_each_source_has_its_share_of_any_100_steps(data, seq_len):
    shares = DATA[data]
    slots, _ = run(shares, seq_len, 200)
    begun = np.array(
        [
            [sum(t.queued.source == s and t.queued.start == 0 for t in slot) for s in range(len(shares))]
            for slot in slots
        ]
    )
    for start in range(0, len(slots) - 100, 10):
        seen = begun[start : start + 100].sum(0)
        np.testing.assert_allclose(seen / seen.sum(), list(shares.values()), rtol=0.1)
