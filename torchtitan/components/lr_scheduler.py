"""Warm-up, stable, decay (WSD; MiniCPM, Hu et al., 2024), as a function of the step.

    1 |      ___________
      |     /           \\
      |    /             \\          decay_ratio unset: decay starts where warm-up ends
    f |   /               \\___
      +----------------------- step
        warm-up  stable  decay
"""

import math

from torchtitan.components.optimizer import Optimizers
from torchtitan.config.job import LRScheduler
from torchtitan.tools.logging import warn_once

SHAPES = {  # what is left of the learning rate after a share `x` of the decay
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
}


def lr_factor(step: int, steps: int, options: LRScheduler) -> float:
    """Share of the peak learning rate in step 1 .. `steps`.

    The decay ends one step after the last, so that no step is taken in vain at a learning rate of zero.
    """
    warmup = options.warmup_steps
    assert warmup <= steps, "fit_warmup has cut it"
    decay = (
        steps - warmup
        if options.decay_ratio is None
        else min(round(steps * options.decay_ratio), steps - warmup)
    )
    if step <= warmup:
        return step / warmup
    into_decay = step - (steps - decay)
    if into_decay <= 0:
        return 1.0
    left = SHAPES[options.decay_type](min(1.0, into_decay / (decay + 1)))
    return options.min_lr_factor + (1 - options.min_lr_factor) * left


def fit_warmup(options: LRScheduler, steps: int) -> None:
    """Cut a warm-up that would not end in this run, with a warning. The last step then has the peak."""
    if options.warmup_steps > steps:
        warn_once(
            f"lr_scheduler.warmup_steps = {options.warmup_steps} is more than training.steps = {steps}: cut "
            f"to {steps}, so that the peak learning rate comes with the last step; ask for fewer to train "
            "at it"
        )
        options.warmup_steps = steps


class Schedule:
    """Sets the learning rate of every parameter group before each step. Its state is the step alone."""

    def __init__(self, optimizers: Optimizers, steps: int, options: LRScheduler):
        self.optimizers, self.steps, self.options = optimizers, steps, options
        self.step = 0
        self.factor = 0.0

    def advance(self) -> None:
        """Go to the next step. `factor` is then its share of the peak learning rate."""
        self.step += 1
        self.factor = lr_factor(self.step, self.steps, self.options)
        self.optimizers.scale_learning_rates(self.factor)

    def state_dict(self) -> dict[str, int]:
        """The steps taken; the shape of the schedule is the job's."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after that step; `advance` sets the rates of the next one."""
        self.step = state["step"]
