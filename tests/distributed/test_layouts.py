"""Layouts equal one process in losses, norms and every parameter's first gradient, and validate alike.

A selection; `python scripts/check_layouts.py` runs them all.
"""

import pytest

from tests.distributed import broken
from tests.distributed.layouts import compare
from tests.distributed.table import BOUND, LAYOUTS, QUICK, Comparison, Row


@pytest.fixture(scope="module")
def comparison():
    return Comparison(steps=2)


@pytest.mark.parametrize("name", QUICK)
def test_layout_equals_one_process(comparison, name):
    row = comparison.row(LAYOUTS[name])
    assert row.equal, f"{row}\n{row.error}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in QUICK])
def test_every_other_layout_equals_one_process(comparison, name):
    row = comparison.row(LAYOUTS[name])
    assert row.equal, f"{row}\n{row.error}"


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "name"), broken.SEEN_IN)
def test_the_comparison_sees_what_is_wrong_without_an_error(comparison, fault, name):
    """Each of these trains on, and its losses of a few steps look right."""
    layout = LAYOUTS[name]
    found = comparison.pool.run(layout.ranks, broken.train_with, fault, layout.changes, layout.ranks)[0]
    difference = compare(found, comparison.reference(layout))
    assert not Row(layout, difference).equal
    assert difference.gradient > 1e3 * BOUND
