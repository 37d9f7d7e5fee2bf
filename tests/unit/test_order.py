"""The order in which slots read: every record once an epoch, whichever rank reads it, and the same always."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from experiments.vlm.data.sources import order
from experiments.vlm.data.sources.order import Deal, permutation


def deal(
    shards: int, slots: int, epochs: int | None = 2, shuffle: bool = True, shuffle_buffer: int = 8
) -> Deal:
    paths = tuple(f"{i}.tar" for i in range(shards))
    return Deal(
        "captions", paths, slots, seed=3, epochs=epochs, shuffle=shuffle, shuffle_buffer=shuffle_buffer
    )


def read_all(dealt: Deal, records: int) -> list[list[tuple[int, int, int]]]:
    """What each slot reads, (epoch, shard, record), to the end."""
    streams = []
    for slot in range(dealt.slots):
        stream, number = [], 0
        while unit := dealt.unit(slot, number):
            stream += [(unit.epoch, unit.shard, int(record)) for record in dealt.order(unit, records)]
            number += 1
        streams.append(stream)
    return streams


def units(dealt: Deal, slot: int) -> list:
    """All that a slot gets."""
    return list(itertools.takewhile(bool, (dealt.unit(slot, number) for number in itertools.count())))


@pytest.mark.parametrize(
    "shards, slots, parts", [(4, 1, 1), (4, 4, 1), (4, 5, 2), (3, 8, 3), (1, 16, 16), (7, 3, 1)]
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_record_is_dealt_once_an_epoch(shards, slots, parts, shuffle):
    dealt = deal(shards, slots, epochs=3, shuffle=shuffle)
    assert dealt.eras[-1].parts == parts
    seen = Counter(entry for stream in read_all(dealt, records=21) for entry in stream)
    assert seen == Counter(
        (epoch, shard, record) for epoch in range(3) for shard in range(shards) for record in range(21)
    )


@pytest.mark.parametrize("shards, slots", [((2, 5), 4), ((1, 2, 9), 6), ((7, 8), 3)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_shards_that_join_change_nothing_that_was_dealt_and_come_once_an_epoch(shards, slots, shuffle):
    joins = tuple((2 * era, count) for era, count in enumerate(shards))
    before, dealt = (
        deal(shards[0], slots, 7, shuffle),
        replace(deal(shards[-1], slots, 7, shuffle), joins=joins),
    )
    begun = [slot + number * slots for slot in range(slots) for number in range(50)]
    for slot, number in ((index % slots, index // slots) for index in begun):
        if before.epoch(slot, number) < 2 and number < before.last_round[0]:
            assert dealt.unit(slot, number) == before.unit(slot, number)
    count_in = [next(count for epoch, count in reversed(joins) if epoch <= now) for now in range(7)]
    assert Counter(entry for stream in read_all(dealt, records=21) for entry in stream) == Counter(
        (epoch, shard, record)
        for epoch in range(7)
        for shard in range(count_in[epoch])
        for record in range(21)
    )
    passes = sum(dealt.passes(slot, len(units(dealt, slot))) for slot in range(slots))
    assert passes == pytest.approx(7)


def test_every_slot_has_work_from_the_first_epoch_on():
    assert all(stream[0][0] == 0 for stream in read_all(deal(3, 8), records=21))


def test_records_move_inside_their_window_only():
    dealt = deal(1, 1, shuffle_buffer=8)
    order = dealt.order(dealt.unit(0, 0), 30)
    assert [sorted(order[start : start + 8]) for start in range(0, 30, 8)] == [
        list(range(start, min(30, start + 8))) for start in range(0, 30, 8)
    ]
    assert order[:8].tolist() != list(range(8))


def test_epochs_differ_and_repeat_themselves():
    first, second = (list(deal(5, 1).order(deal(5, 1).unit(0, number), 21)) for number in (0, 5))
    assert first != second
    orders = [[deal(50, 1).unit(0, number).shard for number in range(start, start + 50)] for start in (0, 50)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_without_shuffling_the_order_is_that_of_the_files():
    (stream,) = read_all(deal(2, 1, epochs=1, shuffle=False), records=3)
    assert stream == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 1, 2)]


def test_a_permutation_never_changes():
    assert permutation(8, 1, 2, 3).tolist() == [1, 3, 7, 5, 2, 0, 4, 6]


@pytest.mark.parametrize("shards, slots, epochs", [(9, 8, 1), (3, 8, 1), (3, 8, 2), (20, 8, 1), (100, 64, 1)])
def test_slots_run_dry_together(shards, slots, epochs):
    """In whole units up to 45 % of all slots' time was left at the end; records here are alike."""
    read = [len(stream) for stream in read_all(deal(shards, slots, epochs), records=2000)]
    assert sum(read) == shards * 2000 * epochs
    assert 1 - sum(read) / (max(read) * slots) < 0.07


def test_only_the_last_round_and_what_is_left_over_are_cut():
    endless, ending = deal(20, 8, None), deal(20, 8, 1)
    assert ending.last_round == (1, 2)  # 12 units left: 24 halves for 8 slots
    for slot in range(8):
        assert ending.unit(slot, 0) == endless.unit(slot, 0)
    assert deal(4, 4, 3).last_round == (3, 1)


def test_many_sources_of_many_shards_draw_each_order_once(monkeypatch):
    drawn = []
    monkeypatch.setattr(order, "permutation", lambda *key: drawn.append(key) or permutation(*key))
    order._epoch_orders.cache_clear()

    class Path(str):
        __hash__ = None  # a source is not looked up by all its shards

    deals = [Deal(f"source {i}", tuple(map(Path, range(50))), 4, 3, epochs=None) for i in range(30)]
    for number in range(24):  # epochs 0 and 1
        assert all(dealt.unit(slot, number) for slot in range(4) for dealt in deals)
    assert len(drawn) == len(set(drawn)) == 30 * 2
