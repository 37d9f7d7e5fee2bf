"""Which source gives a slot's next sample: the one that lags furthest behind its weight.

There is nothing to draw, so the shares are exact to a sample and a position is one number a source. Each slot
starts at a phase of its own, or all slots would ask a rare source at the same step.

Samples that were drawn wait for a slot where they fit. So that waiting changes no shares, a source that is
ahead of its weight in what has left waits for the others: `quota` says how much each may still give.
"""

from collections.abc import Sequence

import numpy as np

# slots' worth of the mixture that a source may be ahead: less costs occupancy, more lets the shares drift
AHEAD = 4.0


class Mixture:
    """Shares of the sources in what one slot reads. `weights` need not add up to 1."""

    def __init__(self, weights: Sequence[float], seed: int, slot: int, typical: float = 1.0):
        """`typical`: what one sample counts, roughly: its tokens where weights count tokens, else 1."""
        self.weights = list(weights)
        self.phases = (
            np.random.PCG64(np.random.SeedSequence([seed, 2, slot])).random_raw(len(self.weights))
            / 2**64
            * typical
        ).tolist()
        self.given = [0] * len(self.weights)
        self.exhausted = [False] * len(self.weights)

    def pick(self) -> int | None:
        """The source to ask; None once all are exhausted."""
        alive = [source for source, exhausted in enumerate(self.exhausted) if not exhausted]
        return min(
            alive,
            key=lambda source: (self.given[source] + self.phases[source]) / self.weights[source],
            default=None,
        )

    def give(self, source: int, amount: int) -> None:
        """Count what a source gave: samples, or tokens, as its weight does."""
        self.given[source] += amount

    def quota(self, waiting: Sequence[float], slots: float) -> np.ndarray:
        """How much of each source may join the next slot; what joins while some is left may exceed it.

        waiting: what of each source was given and has not left. slots: how many slots all of that fills.
        """
        held, weights = np.array(waiting, np.float64), np.array(self.weights)
        left = np.array(self.given) - held
        shares = weights / weights.sum()
        # A source of which nothing waits holds nobody back: its next sample has not been drawn yet, or it has
        # ended.
        level = (left / shares)[held > 0].min() if held.any() else 0.0
        return (level + AHEAD * held.sum() / max(slots, 1.0)) * shares - left

    def position(self) -> dict[str, list]:
        """What `seek` goes on from."""
        return {"given": list(self.given)}

    def seek(self, position: dict[str, list], exhausted: Sequence[bool]) -> None:
        """Go on from a `position`. `exhausted`: for each source whether it has no more."""
        self.given, self.exhausted = list(position["given"]), list(exhausted)
