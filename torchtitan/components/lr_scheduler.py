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

SHAPES = {  # what is left of the learning rate after a share `x` of the decay
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
}


def lr_factor(step: int, steps: int, options: LRScheduler) -> float:
    """Share of the peak learning rate in step 1 .. `steps`.

    Warm-up is cut to a fifth of the steps, so that a short run sees its peak. The decay ends one step after the last,
    so that no step is taken in vain at a learning rate of zero.
    """
    warmup = min(options.warmup_steps, steps // 5)
    decay = steps - warmup if options.decay_ratio is None else min(round(steps * options.decay_ratio), steps - warmup)
    if step <= warmup:
        return step / warmup
    into_decay = step - (steps - decay)
    if into_decay <= 0:
        return 1.0
    left = SHAPES[options.decay_type](min(1.0, into_decay / (decay + 1)))
    return options.min_lr_factor + (1 - options.min_lr_factor) * left


class Schedule:
    """Sets the learning rate of every parameter group before each step. Its state is the step alone."""

    def __init__(self, optimizers: Optimizers, steps: int, options: LRScheduler):
        self.optimizers, self.steps, self.options = optimizers, steps, options
        self.step = 0
        self.factor = 0.0

    def advance(self) -> None:
        self.step += 1
        self.factor = lr_factor(self.step, self.steps, self.options)
        self.optimizers.scale_learning_rates(self.factor)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]
