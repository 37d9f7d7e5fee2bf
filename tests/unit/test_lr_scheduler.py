"""Learning rates against their closed form."""

import logging
import math

import pytest

from torchtitan.components.lr_scheduler import fit_warmup, lr_factor
from torchtitan.config.job import LRScheduler


def factors(steps: int, **options) -> list[float]:
    return [lr_factor(step, steps, LRScheduler(**options)) for step in range(1, steps + 1)]


def test_warm_up_is_linear_and_reaches_the_peak():
    assert factors(100, warmup_steps=10)[:10] == pytest.approx([i / 10 for i in range(1, 11)])


def test_warm_up_may_take_every_step():
    assert factors(10, warmup_steps=10) == pytest.approx([i / 10 for i in range(1, 11)])


def test_warm_up_is_cut_only_where_it_exceeds_the_steps_and_that_is_told(caplog):
    options = LRScheduler(warmup_steps=30)
    with caplog.at_level(logging.INFO, logger="torchtitan"):
        fit_warmup(options, 30)
        assert options.warmup_steps == 30 and not caplog.messages
        fit_warmup(options, 29)
    assert options.warmup_steps == 29
    assert (
        len(caplog.messages) == 1
        and "lr_scheduler.warmup_steps = 30 is more than training.steps = 29" in caplog.text
    )


def test_stable_part_keeps_the_peak_until_the_decay():
    values = factors(100, warmup_steps=10, decay_ratio=0.2)
    assert values[9:80] == [1.0] * 71 and values[80] < 1.0


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ("linear", lambda x: 1 - x),
        ("sqrt", lambda x: 1 - x**0.5),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
    ],
)
def test_decay_follows_its_shape_down_to_the_floor(shape, left):
    values = factors(100, warmup_steps=10, decay_ratio=0.3, decay_type=shape, min_lr_factor=0.1)
    # 30 steps of decay, of which the 31st would be the floor.
    assert values[70:] == pytest.approx([0.1 + 0.9 * left(i / 31) for i in range(1, 31)])


def test_decay_begins_after_warm_up_where_no_ratio_is_given():
    values = factors(100, warmup_steps=10)
    assert (
        values[9] == 1.0 and values[10] == pytest.approx(1 - 1 / 91) and values[-1] == pytest.approx(1 / 91)
    )


def test_no_step_is_taken_at_a_learning_rate_of_zero():
    assert min(factors(20, warmup_steps=4)) > 0
