"""Which source gives a slot's next sample: the one that lags furthest behind its weight.

There is nothing to draw, so the shares are exact to a sample and a position is one number a source. Each slot starts at a
phase of its own, or all slots would ask a rare source at the same step.
"""

from collections.abc import Sequence

import numpy as np


class Mixture:
    def __init__(self, weights: Sequence[float], seed: int, slot: int, typical: float = 1.0):
        """`typical`: what one sample counts, roughly: 1 where weights count samples, its tokens where they count tokens."""
        self.weights = list(weights)
        self.phases = (np.random.PCG64(np.random.SeedSequence([seed, 2, slot])).random_raw(len(self.weights)) / 2**64 * typical).tolist()
        self.given = [0] * len(self.weights)
        self.dry = [False] * len(self.weights)

    def pick(self) -> int | None:
        """The source to ask; None once all are dry."""
        alive = [source for source, dry in enumerate(self.dry) if not dry]
        return min(alive, key=lambda source: (self.given[source] + self.phases[source]) / self.weights[source], default=None)

    def give(self, source: int, amount: int) -> None:
        self.given[source] += amount

    def position(self) -> dict[str, list]:
        return {"given": list(self.given)}

    def seek(self, position: dict[str, list], dry: Sequence[bool]) -> None:
        self.given, self.dry = list(position["given"]), list(dry)
