"""Memory and traffic of a training step, for any number of ranks, from what each unit of a model needs.

A model is a list of units in the order of forward, each a group of parameters that FSDP gathers together.
Memory is followed through one forward and backward: parameters, gradients and optimizer state that stay; what
each unit keeps for backward; what is gathered; and what a unit needs while it works. Not seen: the
allocator's fragmentation and rounding, CUDA's context, buffers of nccl (together about 1 to 2 GiB a GPU), and
a compiler that keeps less than eager execution does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import mul

from torchtitan.config.layout import Degrees
from torchtitan.distributed.footprint import Footprint
from torchtitan.distributed.fsdp import Sharding

FLOAT32 = 4


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers together, counted before it divides them, and their footprint."""

    name: str
    parameters: int = 0
    shards: int = 1  # ranks that FSDP divides the parameters over
    copies: int = 1  # groups of such ranks that hold the same (HSDP)
    trained: int = 0  # of the parameters
    in_backward: bool = True  # gathered again for it; frozen ones too, where something before them trains
    moments: int = 0  # numbers of the optimizer's state, before FSDP divides them
    exchanged: float = 0  # bytes that this rank sends in a step to update them
    stays: bool = False  # gathered from the first forward to the last backward
    idle: int = 0  # parameters that are only kept, divided as the others
    use: Footprint = Footprint()


@dataclass(frozen=True)
class Storage:
    """How parameters are kept, and how often they are moved before an optimizer step."""

    sharding: Sharding
    forwards: int  # accumulation times microbatches
    reductions: int  # of gradients over ranks
    all_reductions: int  # of these, how many go on to the copies of a shard

    @property
    def parameter(self) -> int:
        """Bytes of one in forward and backward."""
        return self.sharding.param_dtype.itemsize

    @property
    def reduced(self) -> int:
        """Bytes of a gradient's element while it is summed over ranks."""
        return self.sharding.reduce_dtype.itemsize

    @property
    def whole_gradients(self) -> bool:
        """Whether gradients stay whole until a pipeline's last microbatch, as its parameters do."""
        return self.reductions < self.forwards


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by what they are."""

    where: str
    state: float  # parameters and optimizer state
    gradients: float
    gathered: float
    kept: float
    working: float

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return self.state + self.gradients + self.gathered + self.kept + self.working


def peak_memory(
    stages: Sequence[Sequence[Unit]],
    storage: Storage,
    in_flight: Sequence[tuple[int, ...]] = ((1,),),
    batch: float = 0,
) -> Memory:
    """`stages`: the units of each that this rank holds. `batch`: bytes of input that stay on the device.

    `in_flight`: how many microbatches of each stage can be between forward and backward at one time.
    """
    kept, gradients = max(_loads(stages, storage, in_flight), key=sum)
    return max(_moments(stages, storage, kept, gradients, batch), key=lambda moment: moment.total)


def _loads(
    stages: Sequence[Sequence[Unit]], s: Storage, in_flight: Sequence[tuple[int, ...]]
) -> Iterator[tuple[float, float]]:
    """Bytes that the microbatches in flight keep, and gradients of those before, at each moment."""
    kept = [sum(unit.use.kept for unit in stage) for stage in stages]
    if not s.whole_gradients:
        shards = sum(u.trained / u.shards * FLOAT32 for stage in stages for u in stage)
        earlier = shards if s.reductions > 1 and not s.sharding.offload else 0.0
        yield from ((sum(map(mul, counts, kept)), earlier) for counts in in_flight)
        return
    whole = [sum(u.trained * s.reduced for u in stage) for stage in stages]
    every = s.forwards // s.reductions
    for counts in in_flight:
        # A stage has gradients once a microbatch has gone back through it: not while all are in flight, but
        # one later.
        for flying in (counts, [n - (n == every) for n in counts]):
            yield sum(map(mul, flying, kept)), sum(w for n, w in zip(flying, whole, strict=True) if n < every)


def _moments(
    stages: Sequence[Sequence[Unit]], s: Storage, most_kept: float, earlier: float, batch: float
) -> Iterator[Memory]:
    units, on_device = [unit for stage in stages for unit in stage], not s.sharding.offload
    state = sum((u.parameters + u.moments + u.idle) / u.shards * FLOAT32 for u in units) * on_device + batch
    full = [u.parameters * s.parameter for u in units]
    for i, (unit, later) in enumerate(_with_later(stages)):
        # What the rest of this microbatch's stage keeps is not there yet in forward, and no more in backward.
        kept = most_kept - later
        # The next unit is gathered while this one works.
        gathered = _gathered(units, full, s, i, i + 1, forward=True)
        yield Memory(f"forward of {unit.name}", state, earlier, gathered, kept, unit.use.forward)
        done = on_device * sum(u.trained / u.shards * FLOAT32 for u in units[i + 1 :])
        own = unit.trained * (s.parameter + s.reduced)
        gathered = _gathered(units, full, s, i, i - 1, forward=False)
        yield Memory(
            f"backward of {unit.name}", state, max(earlier, done), gathered, kept, unit.use.backward + own
        )


def _with_later(stages: Sequence[Sequence[Unit]]) -> Iterator[tuple[Unit, float]]:
    """Each unit, and what those after it in its stage keep."""
    for stage in stages:
        for i, unit in enumerate(stage):
            yield unit, sum(later.use.kept for later in stage[i + 1 :])


def _gathered(
    units: Sequence[Unit], full: Sequence[float], s: Storage, at: int, next_to: int, forward: bool
) -> float:
    """Bytes that are gathered while unit `at` works and `next_to` comes; all so far where none are freed."""
    if not s.sharding.reshard_after_forward:
        return sum(full[: next_to + 1]) if forward and not s.whole_gradients else sum(full)
    return sum(f for j, (u, f) in enumerate(zip(units, full, strict=True)) if u.stays or j in (at, next_to))


def traffic(units: Sequence[Unit], storage: Storage) -> dict[str, float]:
    """Bytes that one rank sends in an optimizer step, by collective."""
    total: dict[str, float] = {}

    def add(name: str, amount: float) -> None:
        if amount:
            total[name] = total.get(name, 0.0) + amount

    for unit in units:
        others = (unit.shards - 1) / unit.shards
        gathers = (
            storage.forwards * (1 + unit.in_backward)
            if storage.sharding.reshard_after_forward
            else storage.reductions
        )
        add("fsdp all-gather", gathers * others * unit.parameters * storage.parameter)
        add("fsdp reduce-scatter", storage.reductions * others * unit.trained * storage.reduced)
        shard = unit.trained / unit.shards
        add(
            "hsdp all-reduce",
            storage.all_reductions * 2 * (unit.copies - 1) / unit.copies * shard * storage.reduced,
        )
        add("optimizer updates", unit.exchanged)
        for name, amount in unit.use.sent.items():
            add(name, amount * storage.forwards)
    return total


def in_flight(schedule: str, rank: int, ranks: int, microbatches: int) -> list[tuple[int, ...]]:
    """At each moment of a schedule: how many microbatches of each stage of a rank wait for their backward.

    Interleaved schedules are those of two stages a rank.
    """
    if ranks == 1 or schedule in ("GPipe", "1F1B"):
        return [
            (1 if ranks == 1 else microbatches if schedule == "GPipe" else min(microbatches, ranks - rank),)
        ]
    if schedule == "ZBVZeroBubble":
        return [(min(microbatches, 2 * ranks - rank), min(microbatches, rank + 1))]
    return _interleaved(rank, ranks, microbatches, 1 if schedule.endswith("ZeroBubble") else 2)


def _interleaved(rank: int, ranks: int, microbatches: int, factor: int) -> list[tuple[int, ...]]:
    """Rounds of as many microbatches as ranks pass the first stage, then the second; backward vice versa."""
    size = microbatches // max(1, microbatches // ranks)
    rounds = [(stage, begin) for begin in range(0, microbatches, size) for stage in (0, 1)]
    forwards = [stage for stage, _ in rounds for _ in range(size)]
    backwards = [1 - stage for stage in forwards]
    warm_up = min(len(forwards), size + factor * (ranks - 1 - rank))
    counts, moments = [0, 0], []
    for step in range(len(forwards) + warm_up):
        if step < len(forwards):
            counts[forwards[step]] += 1
            moments.append(tuple(counts))
        if step >= warm_up:
            counts[backwards[step - warm_up]] -= 1
    return moments


def factorisations(world_size: int, most: Degrees) -> Iterator[Degrees]:
    """Every mesh of `world_size` ranks, with at most `most` in each dimension; FSDP takes the rest."""
    for tp in _divisors(world_size, most.tp):
        for pp in _divisors(world_size // tp, most.pp):
            for cp in _divisors(world_size // (tp * pp), most.cp):
                data = world_size // (tp * pp * cp)
                for replicate in _divisors(data, most.dp_replicate):
                    yield Degrees(replicate, data // replicate, cp, tp, pp)


def _divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]
