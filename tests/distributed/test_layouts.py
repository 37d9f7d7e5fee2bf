"""Layouts equal one process in losses, norms, held-out figures, every first gradient and last weight.

A selection; `python -m tests.distributed` runs them all.
"""

import pytest

from tests.distributed import broken
from tests.distributed.layouts import compare, train
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


def test_a_frozen_encoder_has_no_gradients(comparison):
    gradients = comparison.reference(LAYOUTS["fsdp2, tied, frozen encoder"]).gradients
    assert gradients and not any(name.startswith("encoder") for name in gradients)


def test_bfloat16_stays_near_float32(comparison):
    fsdp = LAYOUTS["fsdp2"]
    low = comparison.pool.run(
        2, train, fsdp.changes | {"training.mixed_precision_param": "bfloat16"}, 2, comparison.steps
    )[0]
    # Eight bits of mantissa: 2^-8 = 0.4 % an operation, averaged over many.
    assert low.losses == pytest.approx(comparison.reference(fsdp).losses, rel=2e-2)
    assert low.losses != comparison.reference(fsdp).losses


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "name"), broken.SEEN_IN)
def test_the_comparison_sees_what_raises_no_error(comparison, fault, name):
    """Each of these trains on, and its losses of a few steps look right."""
    layout = LAYOUTS[name]
    found = comparison.pool.run(layout.ranks, broken.train_with, fault, layout.changes, layout.ranks)[0]
    difference = compare(found, comparison.reference(layout))
    assert not Row(layout, difference).equal
    assert difference.gradient > 1e3 * BOUND
