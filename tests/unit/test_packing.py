"""Planning: nothing beyond the budget, nothing lost, nothing starves, little wasted."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.vlm.data.packing import Budget, Waiting, choose, place

budgets = st.builds(
    Budget, st.integers(64, 300), st.integers(1, 4), st.integers(16, 100).map(lambda n: 4 * n)
)


@st.composite
def packings(draw):
    """A budget, and samples that each fit an empty slot: (tokens, patches of each image)."""
    budget = draw(budgets)
    one = st.integers(1, budget.patches_per_row // 4).map(lambda n: 4 * n)
    sample = st.tuples(st.integers(1, budget.seq_len), st.lists(one, max_size=4))
    return budget, draw(st.lists(sample.filter(lambda s: budget.holds(*s)), min_size=1, max_size=40))


def waiting(samples) -> Waiting:
    return Waiting(
        np.array([tokens for tokens, _ in samples]),
        np.array([sum(images) for _, images in samples]),
        [images for _, images in samples],
    )


def pack_all(samples, budget, lookahead: int):
    """Slots of (index in the stream, sample), with at most `lookahead` waiting."""
    stream, window, slots = list(enumerate(samples)), [], []
    while stream or window:
        while stream and len(window) < lookahead:
            window.append(stream.pop(0))
        chosen = choose(waiting([sample for _, sample in window]), budget)
        slots.append([window[i] for i in chosen])
        window = [entry for i, entry in enumerate(window) if i not in chosen]
    return slots


@settings(max_examples=60, deadline=None)
@given(packings(), st.integers(1, 20))
def test_what_came_in_comes_out_once_within_both_budgets(packing, lookahead):
    budget, samples = packing
    slots = pack_all(samples, budget, lookahead)
    assert Counter(index for slot in slots for index, _ in slot) == Counter(range(len(samples)))
    for slot in slots:
        assert sum(tokens for _, (tokens, _) in slot) <= budget.seq_len
        assert place([patches for _, (_, images) in slot for patches in images], budget) is not None


@settings(max_examples=40, deadline=None)
@given(packings(), st.integers(1, 20))
def test_nothing_waits_for_more_slots_than_there_were_samples_before_it(packing, lookahead):
    budget, samples = packing
    slots = pack_all(samples, budget, lookahead)
    left = {index: number for number, slot in enumerate(slots) for index, _ in slot}
    for number in range(len(slots)):
        window = [index for index in range(len(samples)) if left[index] >= number][:lookahead]
        for before, index in enumerate(window):
            assert left[index] - number <= before


@settings(max_examples=60, deadline=None)
@given(budgets, st.lists(st.integers(1, 60).map(lambda n: 4 * n), max_size=12))
def test_images_lie_inside_rows_and_apart(budget, images):
    places = place(images, budget)
    if places is None:
        assert sum(images) > budget.patches / 2 or max(images) > budget.patches_per_row
        return
    cells = [
        (row, cell)
        for (row, first), patches in zip(places, images, strict=True)
        for cell in range(first, first + patches)
    ]
    assert len(set(cells)) == len(cells)
    assert all(0 <= row < budget.patch_rows and 0 <= cell < budget.patches_per_row for row, cell in cells)


def test_one_sample_larger_than_what_is_left_waits_for_an_emptier_slot():
    budget = Budget(seq_len=100, patch_rows=1, patches_per_row=400)
    slots = pack_all([(60, [200]), (60, [200]), (40, [200]), (40, [4])], budget, lookahead=4)
    assert [sorted(index for index, _ in slot) for slot in slots] == [[0, 2], [1, 3]]


@pytest.mark.parametrize("rows", [1, 2])
def test_both_sides_of_a_slot_fill_up(rows):
    """Captions of CC12M's shape, an eighth of the benchmark's slots: 7 samples a slot,
    a look-ahead of 256.
    """
    random = np.random.default_rng(0)
    patches = 4 * random.integers(16, 250, 2000)
    samples = [
        (int(p) // 4 + 3 + int(text), [int(p)])
        for p, text in zip(patches, random.integers(5, 40, 2000), strict=True)
    ]
    ratio = sum(p for _, (p,) in samples) / sum(tokens for tokens, _ in samples)
    budget = Budget(2048, rows, int(2048 * ratio / rows / 4) * 4)
    slots = pack_all(samples, budget, lookahead=256)[:100]
    tokens = sum(tokens for slot in slots for _, (tokens, _) in slot) / (len(slots) * budget.seq_len)
    patches = sum(sum(images) for slot in slots for _, (_, images) in slot) / (len(slots) * budget.patches)
    assert tokens > 0.98 and patches > (0.98 if rows == 1 else 0.95)


def test_a_plan_is_the_same_on_every_machine_and_in_every_version():
    """A run that goes on elsewhere must find what it would have found here."""
    i = np.arange(200)
    many = Waiting(10 + (i * 7919) % 487, 4 * ((i * 104729) % 251))
    assert choose(many, Budget(4096, 1, 8192)) == [*range(15), 69, 110]


def test_a_sample_is_taken_in_one_of_its_ways_at_most():
    """The oldest leaves 40 tokens; sample 1 would fill them twice over, in two ways."""
    ways = Waiting(np.array([60, 25, 15, 15]), np.array([60, 25, 14, 15]), owner=np.array([0, 1, 2, 1]))
    assert choose(ways, Budget(100, 1, 100)) in ([0, 1, 2], [0, 2, 3])


def test_a_source_without_quota_waits_unless_it_is_the_oldest():
    tokens = np.full(6, 30)
    waiting = Waiting(
        tokens, tokens, group=np.array([0, 1, 0, 1, 0, 1]), cost=np.ones(6), quota=np.array([0.0, 9.0])
    )
    assert choose(waiting, Budget(90, 1, 90)) == [0, 1, 3]


def test_no_room_is_kept_for_images_whose_source_has_to_wait():
    """150 short texts, and a page of images that may not join yet."""
    tokens, patches = np.array([20] * 150 + [670]), np.array([0] * 150 + [1600])
    group, quota = np.array([0] * 150 + [1]), np.array([9999.0, 0.0])
    waiting = Waiting(tokens, patches, group=group, cost=tokens * 1.0, quota=quota)
    chosen = choose(waiting, Budget(2048, 1, 4096))
    assert len(chosen) == 102 and 150 not in chosen
