"""What came before is told, against a set of all that came."""

import random

import numpy as np
import pytest

from experiments.vlm.prepare.dedup import find_repeated, url_hash


@pytest.mark.parametrize("pass_hashes", [1, 50, 10**6])
def test_repeated_is_what_came_before(pass_hashes):
    rng = random.Random(0)
    arrays = [np.array([rng.randrange(60) for _ in range(rng.randrange(40))], np.uint64) for _ in range(12)]
    arrays.append(np.array([2**64 - 1, 2**64 - 1, 0, 0], np.uint64))
    seen: set[int] = set()
    expected = []
    for array in arrays:
        expected.append([])
        for value in array.tolist():
            expected[-1].append(value in seen and value != 0)
            seen.add(value)
    assert [array.tolist() for array in find_repeated(arrays, pass_hashes)] == expected


def test_a_fragment_does_not_make_another_url():
    assert url_hash("http://a/b#c") == url_hash("http://a/b") != url_hash("http://a/c")
    assert url_hash("") == 0
