"""Each slot asks the sources so that their shares hold, from the first samples on."""

from collections import Counter

import numpy as np

from experiments.vlm.data.sources.mixture import Mixture


def test_shares_are_exact_to_a_sample():
    mixture = Mixture([0.6, 0.3, 0.1], seed=0, slot=0)
    for number in range(1, 200):
        mixture.give(mixture.pick(), 1)
        assert all(
            abs(given - number * weight) < 1.5
            for given, weight in zip(mixture.given, [0.6, 0.3, 0.1], strict=True)
        )


def picks(mixture: Mixture, count: int) -> list[int]:
    picked = []
    for _ in range(count):
        picked.append(mixture.pick())
        mixture.give(picked[-1], 1)
    return picked


def test_slots_do_not_ask_a_rare_source_together():
    firsts = [picks(Mixture([0.99, 0.01], seed=0, slot=slot), 102).index(1) for slot in range(100)]
    assert np.std(firsts) > 20 and 35 < np.mean(firsts) < 65


def test_an_exhausted_source_leaves_the_others_their_shares():
    mixture = Mixture([1, 1, 2], seed=0, slot=0)
    mixture.exhausted[0] = True
    assert Counter(picks(mixture, 30)) == {1: 10, 2: 20}
    mixture.exhausted[:] = [True] * 3
    assert mixture.pick() is None
