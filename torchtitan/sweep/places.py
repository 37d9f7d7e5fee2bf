"""Several runs at a time on one machine: each gets GPUs, or its share of the cores. Imports no torch."""

from collections.abc import Mapping

from torchtitan.config.devices import visible_gpus
from torchtitan.config.errors import require

Place = dict[str, str]  # variables of a run


def places(at_once: int, processes: int, gpus: list[str], cores: int, threads: str = "") -> list[Place]:
    """Where runs may start: NGPU, CUDA_VISIBLE_DEVICES and OMP_NUM_THREADS of each.

    `at_once` and `processes` (of a run): 0 where nobody said. `threads`: OMP_NUM_THREADS of the sweep's own
    environment, which is kept. Raises ConfigError where there are too few GPUs.
    """
    if gpus:
        at_once = at_once or max(1, len(gpus) // (processes or 1))
        processes = processes or len(gpus) // at_once
        asked = f"{at_once} runs at once with {max(1, processes)} GPUs each (NGPU)"
        fit = 0 < at_once * processes <= len(gpus)
        require(fit, f"{asked} need more than the {len(gpus)} that are visible")
    at_once, processes = at_once or 1, processes or 1
    # One core of each run is left to its loader (as the train command leaves it).
    threads = threads or str(max(1, cores // (at_once * processes) - 1))
    found = []
    for place in range(at_once):
        variables = {"NGPU": str(processes), "OMP_NUM_THREADS": threads}
        if gpus:
            own = gpus[place * processes : (place + 1) * processes]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        found.append(variables)
    return found


def gpus_of(variables: Mapping[str, str]) -> list[str]:
    """The visible GPUs, by the names that CUDA_VISIBLE_DEVICES gives them."""
    count, named = visible_gpus(), variables.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in named.split(",")][:count] if named else [str(n) for n in range(count)]
