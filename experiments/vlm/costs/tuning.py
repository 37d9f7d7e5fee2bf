"""What `tune` may change of a job without changing what is learnt, and which of it fits the device.

The slots of an optimizer step stay as the job asks: with fewer slots a forward there are more forwards. With
each change goes the least recomputation that fits, so that neither memory nor time is given away; the planner
(estimate.py) knows both before anything runs.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

from experiments.vlm.check import check_vlm
from experiments.vlm.config import VLMActivationCheckpoint, VLMJobConfig
from experiments.vlm.costs.estimate import Estimate, Shares, estimate_with
from torchtitan.config.errors import ConfigError
from torchtitan.config.layout import degrees, resolve_batch
from torchtitan.config.recomputation import Recomputation
from torchtitan.layers.attention import BACKENDS, resolve_backend
from torchtitan.sweep.space import Assignment
from torchtitan.tools.hardware import GIB

LENGTH, SLOTS = "data.patches_per_row", "training.local_batch_size"
STEP, CHUNK = "training.global_batch_size", "training.loss_chunk_tokens"
ATTENTION, RECOMPUTATION = "model.attention_backend", "activation_checkpoint."
KEYS = (
    *(LENGTH, SLOTS, STEP, CHUNK, ATTENTION),
    *(RECOMPUTATION + name for name in vars(VLMActivationCheckpoint())),
)
Candidate = tuple[Any, ...]  # the values of KEYS
Directions = Iterator[Iterable[Candidate]]

FEW, APART, CHEAPER = 3, 1.05, 0.998  # lengths: how many, how far from each other, and how much is a gain
BLOCK = 128  # tokens or patches that a GPU's attention takes at a time
LEAST_CHUNK = 256
SMALLER = 0.9  # of the plan of a candidate that did not fit: the most to plan from then on


def values(job: VLMJobConfig) -> Candidate:
    """What a job says of KEYS."""
    return tuple(getattr(getattr(job, key.split(".")[0]), key.split(".")[1]) for key in KEYS)


def with_values(job: VLMJobConfig, candidate: Candidate) -> VLMJobConfig:
    """The job with these values of KEYS."""
    return with_settings(job, dict(zip(KEYS, candidate, strict=True)))


def with_settings(job: VLMJobConfig, settings: Assignment) -> VLMJobConfig:
    """The job with other values of some options."""
    job = deepcopy(job)
    for key, value in settings.items():
        section, name = key.split(".")
        setattr(getattr(job, section), name, value)
    return job


class Planner:
    """What candidates need of a device, and the most that may be planned for: `limit_gib`."""

    def __init__(self, job: VLMJobConfig, ranks: int, vocab_size: int, on_gpu: bool, limit_gib: float):
        self.job, self.ranks, self.limit_gib = job, ranks, limit_gib
        self.sizes = degrees(job.parallelism, ranks)
        self._shares = Shares(job, vocab_size, on_gpu)
        self._peaks: dict[Candidate, float] = {}
        self._least: dict[tuple[Candidate, float], Candidate] = {}  # and the limit that it is within
        self._ran_gib = 0.0  # the largest plan that ran
        self.left_out: dict[Candidate, float] = {}  # GiB of what was too large to be tried

    def of_job(self) -> Estimate:
        """The job as it is. Raises ConfigError where its own memory budget cannot be kept."""
        return self._estimate(self.job, values(self.job))

    def peak_gib(self, candidate: Candidate) -> float:
        """Estimated, of a rank. Raises ConfigError where it cannot run."""
        if candidate not in self._peaks:
            job = with_values(self.job, candidate)
            check_vlm(job, self.ranks)
            self._estimate(job, candidate)
        return self._peaks[candidate]

    def fits(self, candidate: Candidate) -> bool:
        """Whether it can run, and within the limit."""
        try:
            peak = self.peak_gib(candidate)
        except ConfigError:
            return False
        if peak > self.limit_gib:
            self.left_out[candidate] = peak
        return peak <= self.limit_gib

    def least(self, candidate: Candidate) -> Candidate | None:
        """The same with the least recomputation that fits; None where none does."""
        asked = candidate, self.limit_gib
        if asked not in self._least:
            self._least[asked] = self._within(*asked)
        found = self._least[asked]
        return found if self.fits(found) else None

    def _within(self, candidate: Candidate, gib: float) -> Candidate:
        job = with_values(self.job, candidate)
        job.activation_checkpoint = VLMActivationCheckpoint(memory_budget_gib=gib)
        try:
            check_vlm(job, self.ranks)
            return values(self._estimate(job).job)
        except ConfigError:  # not even with the most
            job.activation_checkpoint = VLMActivationCheckpoint(mode="full", encoder_mode="full")
            return values(job)

    def _estimate(self, job: VLMJobConfig, candidate: Candidate | None = None) -> Estimate:
        """The estimate; keeps its peak as that of `candidate`, else of the job as fitted to its budget."""
        found = estimate_with(self._shares, job, self.sizes)
        self._peaks[candidate or values(found.job)] = found.memory.total / GIB
        return found

    def did_fit(self, candidate: Candidate) -> None:
        """It ran: candidates that need no more by the plan go on to be tried."""
        self._ran_gib = max(self._ran_gib, self.peak_gib(candidate))

    def did_not_fit(self, candidate: Candidate) -> None:
        """From now on plan for less."""
        self.limit_gib = min(self.limit_gib, max(self._ran_gib, SMALLER * self.peak_gib(candidate)))


class Space:
    """The changes that are tried, those that may gain most first. `lengths`: L, the best first."""

    def __init__(self, planner: Planner, lengths: Iterable[int], on_gpu: bool):
        self.planner, self.job, sizes = planner, planner.job, planner.sizes
        self.own, batch = values(self.job), resolve_batch(self.job, planner.ranks)
        self._lengths, self._step = list(lengths), batch.global_
        slots = batch.global_ // sizes.dp
        self._slots = [count for count in range(1, slots + 1) if slots % count == 0]
        piped = self.job.parallelism.pipeline_parallel_microbatch_size if sizes.pp > 1 else 0
        self._piped, self._cp = piped, sizes.cp
        backend, device = self.job.model.attention_backend, "cuda" if on_gpu else "cpu"
        # On a CPU FlexAttention has no backward, so there is no choice.
        self._backends = [name for name in BACKENDS if on_gpu and name != resolve_backend(backend, device)]
        self.changes = [self.recomputation, self.length, self.slots, self.chunk, self.backend]

    def recomputation(self, now: Candidate) -> Directions:
        """The least that fits; where that is some, what keeps alike in all layers too."""
        yield self._kept(now)

    def length(self, now: Candidate) -> Directions:
        """Each length that the adviser found, by itself."""
        for length in self._lengths:
            yield self._along(now, LENGTH, [length])

    def slots(self, now: Candidate) -> Directions:
        """More slots a forward, in fewer forwards; then fewer."""
        (here,) = of(now, SLOTS)
        yield self._along(now, SLOTS, [count for count in self._slots if count > here])
        yield self._along(now, SLOTS, [count for count in reversed(self._slots) if count < here])

    def chunk(self, now: Candidate) -> Directions:
        """Twice as many tokens at one time, and so on to all of a forward; then half as many."""
        slots, here = of(now, SLOTS, CHUNK)
        most = max(1, (self._piped or slots) * self.job.training.seq_len // self._cp)
        here = min(here, most)
        up = [here << n for n in range(1, 32) if here << n < 2 * most]
        yield self._along(now, CHUNK, up)
        yield self._along(now, CHUNK, [here >> n for n in range(1, 32) if here >> n >= LEAST_CHUNK])

    def backend(self, now: Candidate) -> Directions:
        """The other kernels of attention."""
        for name in self._backends:
            yield self._along(now, ATTENTION, [name])

    def job_of(self, candidate: Candidate) -> VLMJobConfig:
        """The whole job of a candidate."""
        return with_values(self.job, candidate)

    def peak_gib(self, candidate: Candidate) -> float:
        """Memory of a rank, by the plan."""
        return self.planner.peak_gib(candidate)

    def did_fit(self, candidate: Candidate) -> None:
        """It ran."""
        self.planner.did_fit(candidate)

    def did_not_fit(self, candidate: Candidate) -> None:
        """It did not fit: nothing as large by the plan is proposed any more."""
        self.planner.did_not_fit(candidate)

    def settings(self, candidate: Candidate) -> Assignment:
        """Option -> value, where it differs from the job."""
        both = zip(KEYS, candidate, self.own, strict=True)
        return {key: value for key, value, own in both if value != own}

    def shown(self, candidate: Candidate) -> dict[str, str]:
        """A candidate's cells of a table."""
        job = with_values(self.job, candidate)
        training, ac = job.training, job.activation_checkpoint
        kept = f"as {ac.memory_budget_gib:g} GiB ask" if ac.memory_budget_gib else _described(ac)
        found: dict[str, Any] = {"B": training.local_batch_size, "L": job.data.patches_per_row}
        found |= {"chunk": training.loss_chunk_tokens, "recomputed": kept}
        found |= {"attention": job.model.attention_backend} if self._backends else {}
        return {name: str(value) for name, value in found.items()}

    def _kept(self, now: Candidate) -> Iterator[Candidate]:
        yield from self._least(now)
        least = self.planner.least(now)
        if least is None or recomputes_nothing(with_values(self.job, least)):
            return
        for mode in ("selective", "full"):
            job = with_values(self.job, now)
            job.activation_checkpoint = VLMActivationCheckpoint(mode=mode, encoder_mode=mode)
            if self.planner.fits(values(job)):
                yield values(job)

    def _least(self, now: Candidate) -> Iterator[Candidate]:
        """With the least recomputation that fits; where it did not fit after all, once more with more."""
        for _ in range(2):
            limit, least = self.planner.limit_gib, self.planner.least(now)
            if least is not None:
                yield least
            if self.planner.limit_gib == limit:
                return

    def _along(self, now: Candidate, key: str, wanted: Iterable[Any]) -> Iterator[Candidate]:
        for value in wanted:
            job = with_settings(with_values(self.job, now), {key: value})
            own = job.training.local_batch_size == of(self.own, SLOTS)[0]
            job.training.global_batch_size = of(self.own, STEP)[0] if own else self._step
            moved = values(job)
            # A candidate that recomputes on purpose keeps doing so, where it fits.
            if now != self.planner.least(now) and self.planner.fits(moved):
                yield moved
            else:
                yield from self._least(moved)


def of(candidate: Candidate, *keys: str) -> list[Any]:
    """A candidate's values of some of KEYS."""
    return [candidate[KEYS.index(key)] for key in keys]


def recomputes_nothing(job: VLMJobConfig) -> bool:
    """Whether neither tower recomputes."""
    ac = job.activation_checkpoint
    return all(not of.until and of.mode == "none" for of in (ac.encoder, ac.decoder))


def _described(ac: VLMActivationCheckpoint) -> str:
    encoder, decoder = _tower(ac.encoder), _tower(ac.decoder)
    return encoder if encoder == decoder else f"encoder {encoder}, decoder {decoder}"


def _tower(kept: Recomputation) -> str:
    if kept.mode != "none":
        return kept.mode if kept.mode == "full" or kept.option == "op" else f"every {kept.option}th"
    parts = {"full": kept.full_layers, "selective": kept.selective_layers}
    return " + ".join(f"{number} {name}" for name, number in parts.items() if number) or "none"


def promising(costs: Mapping[int, float], own: int, merge: int, on_gpu: bool) -> list[int]:
    """L to try, the best first. `costs`: FLOPs of a useful token at each L that was tried; where there was no
    time for `own`, all may be better.

    A few that cost less than the job's own, no two alike; on a GPU also the best in whole blocks.
    """
    found: list[int] = []
    most = CHEAPER * costs.get(own, math.inf)
    for length in sorted(costs, key=costs.__getitem__):
        apart = all(max(length, other) / min(length, other) >= APART for other in found)
        if length != own and costs[length] < most and apart and len(found) < FEW:
            found.append(length)
    best = (found or [own])[0]
    whole = -(-best // math.lcm(BLOCK, merge**2)) * math.lcm(BLOCK, merge**2)
    return [*found, whole] if on_gpu and whole not in (*found, own) else found
