"""Where a rank's steps come from: its own process, or workers that run ahead. Both give the same steps.

next()       the next step: the arrays that hold it, and a SlotStep for each slot in order
close()
"""

import multiprocessing.util
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from experiments.vlm.batch import BatchShape
from experiments.vlm.data.producer import Producer, SlotStep
from experiments.vlm.data.resume import SlotState
from experiments.vlm.data.setup import Setup
from experiments.vlm.data.shared_memory import Arrays, Buffers, slot_views
from experiments.vlm.data.workers import Assignment, Worker, close_all

KEPT = 2  # steps that hold after they were given: the one in use, and the one before it


class Supply(Protocol):
    def next(self) -> tuple[Arrays, list[SlotStep]]: ...

    def close(self) -> None: ...


def make_supply(setup: Setup, slots: Sequence[int], states: dict[int, SlotState], shape: BatchShape, workers: int, prefetch: int) -> Supply:
    if workers == 0:
        return InProcess(setup, slots, states, shape)
    return FromWorkers(setup, slots, states, shape, workers, prefetch)


class InProcess:
    """Reads and decodes when it is asked."""

    def __init__(self, setup: Setup, slots: Sequence[int], states: dict[int, SlotState], shape: BatchShape):
        self.slots = slots
        self.arrays = deque(Buffers(shape, KEPT).arrays)
        self.rows = shape.patch_rows
        self.producer = Producer(setup, slots, states)

    def next(self) -> tuple[Arrays, list[SlotStep]]:
        arrays = self.arrays[0]
        self.arrays.rotate(-1)
        return arrays, self.producer.start([slot_views(arrays, place, self.rows) for place in range(len(self.slots))])()

    def close(self) -> None:
        self.producer.close()


class FromWorkers:
    """Worker w runs slots w, w + workers, ... of the rank; all are `prefetch` steps ahead.

    Step n lies in buffer n modulo their number, prefetch + KEPT: the one that step n + prefetch overwrites is n - KEPT's.
    """

    def __init__(self, setup: Setup, slots: Sequence[int], states: dict[int, SlotState], shape: BatchShape, workers: int, prefetch: int):
        self.prefetch = prefetch
        self.buffers = Buffers(shape, prefetch + KEPT)
        self.places = [list(range(worker, len(slots), workers)) for worker in range(workers)]
        self.slots = slots
        self.workers: list[Worker] = []
        # Before multiprocessing's own shutdown, which would wait for workers that nobody told to end.
        self.shutdown = multiprocessing.util.Finalize(self, close_all, (self.workers,), exitpriority=100)
        for number, places in enumerate(self.places):
            self.workers.append(Worker(number, setup, shape, self.buffers, self._assignment(places, states)))
        self.asked = self.given = 0

    def next(self) -> tuple[Arrays, list[SlotStep]]:
        """Raises DataError, or RuntimeError for a worker that failed or died."""
        while self.asked <= self.given + self.prefetch:
            for worker in self.workers:
                worker.ask(self.asked % len(self.buffers.arrays))
            self.asked += 1
        steps: list[SlotStep | None] = [None] * len(self.slots)
        for worker, places in zip(self.workers, self.places, strict=True):
            for place, step in zip(places, worker.answer(), strict=True):
                steps[place] = step
        arrays = self.buffers.arrays[self.given % len(self.buffers.arrays)]
        self.given += 1
        return arrays, [step for step in steps if step is not None]

    def close(self) -> None:
        self.shutdown()
        self.buffers.close()

    def _assignment(self, places: list[int], states: dict[int, SlotState]) -> Assignment:
        slots = [self.slots[place] for place in places]
        return Assignment(slots, places, {slot: states[slot] for slot in slots if slot in states})
