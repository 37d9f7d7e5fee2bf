"""Which layers a stage of a pipeline holds, and which stages a rank. Imports no torch.

Interleaved*, 2 ranks, 4 stages     rank 0: 0 2   rank 1: 1 3
ZBVZeroBubble, 2 ranks, 4 stages    rank 0: 0 3   rank 1: 1 2
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torchtitan.config.layout import STAGES_PER_RANK


def number_of_stages(schedule: str, ranks: int) -> int:
    """How many stages there are, unless split points say otherwise."""
    return ranks * STAGES_PER_RANK[schedule]


def stages_of_rank(schedule: str, rank: int, ranks: int, stages: int) -> list[int]:
    """Numbers of the stages that a rank holds, ascending."""
    if schedule == "ZBVZeroBubble":
        return [rank, 2 * ranks - 1 - rank]
    return list(range(rank, stages, ranks))


def rank_of_stage(schedule: str, stage: int, ranks: int, stages: int) -> int:
    """The rank along pp that holds this stage of `stages`."""
    return next(rank for rank in range(ranks) if stage in stages_of_rank(schedule, rank, ranks, stages))


def split_evenly(
    costs: Sequence[float], first: float, last: float, stages: int, empty_first: bool = False
) -> list[int]:
    """First layer of each stage but stage 0, so that the most expensive stage costs least (then the squares,
    so that the rest is even).

    `first` and `last` are what the end stages cost besides their layers; they may hold no layer, the others
    hold at least one. `empty_first`: stage 0 holds none.
    """
    layers = len(costs)
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)

    def cost_of(stage: int, begin: int, end: int) -> float:
        return total[end] - total[begin] + first * (stage == 0) + last * (stage == stages - 1)

    # best[end]: (cost of the most expensive stage, sum of squares, cuts) of the stages so far over the layers
    # before `end`
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for stage in range(stages):
        least = 0 if stage in (0, stages - 1) else 1
        ends = [0] if stage == 0 and empty_first else range(layers + 1) if stage < stages - 1 else [layers]
        found = {}
        for end in ends:
            options = [
                (
                    max(highest, cost_of(stage, begin, end)),
                    squares + cost_of(stage, begin, end) ** 2,
                    [*cuts, begin],
                )
                for begin, (highest, squares, cuts) in best.items()
                if end - begin >= least
            ]
            if options:
                found[end] = min(options)
        best = found
    return best[layers][2][1:]


@dataclass(frozen=True)
class Split:
    """How the layers lie on the stages: `first_layers[i]` is the first of stage i + 1."""

    layers: int
    first_layers: tuple[int, ...]

    @property
    def stages(self) -> int:
        """How many stages there are, the first one included."""
        return len(self.first_layers) + 1

    def of(self, stage: int) -> range:
        """The layers of a stage; empty where it holds none."""
        cuts = (0, *self.first_layers, self.layers)
        return range(cuts[stage], cuts[stage + 1])
