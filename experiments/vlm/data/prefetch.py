"""A rank's steps as nodes of torchdata: from its own process or from workers that run ahead, pinned for a
GPU.

    InProcess or FromWorkers     the steps, in memory that is used again
    PinMemory, Prefetcher        where there is a GPU: copies in pinned memory, made alongside training

A step carries its own state (SlotStep.state), so that of a node is empty: a snapshot of nodes could only be
resumed at the same number of workers.
"""

import contextlib
import multiprocessing.util
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor
from torchdata.nodes import BaseNode, PinMemory, Prefetcher

from experiments.vlm.batch import BatchShape
from experiments.vlm.data.producer import Producer, SlotStep
from experiments.vlm.data.resume import SlotState
from experiments.vlm.data.setup import Setup
from experiments.vlm.data.shared_memory import Arrays, Buffers, slot_views
from experiments.vlm.data.workers import Assignment, Worker, close_all
from torchtitan.distributed.collectives import STILL_WAITING_S

KEPT = 2  # steps that hold after they were given: the one in use, and the one before it
READY = 1  # pinned steps that wait, besides the one that PinMemory's own thread has made

# A step: its fields with all slots of the rank, and a SlotStep for each slot in order.
Filled = tuple[dict[str, Tensor], list[SlotStep]]


class StepNode(BaseNode[Filled | Exception]):
    """Steps without end. A step's tensors hold until the second `next()` after the one that gave them.

    An error is given in place of a step: torchdata would raise another, with its text inside a traceback.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stopped = False

    def next(self) -> Filled | Exception:
        """The next step, or the error that it met. Raises StopIteration after `stop`."""
        if self.stopped:
            raise StopIteration
        try:
            arrays, steps = self.step()
        except Exception as error:
            return error
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, steps

    def get_state(self) -> dict:
        """Empty: a step carries its own state."""
        return {}

    def step(self) -> tuple[Arrays, list[SlotStep]]:
        """The arrays of the next step, [B * accumulation, ...], and a SlotStep for each slot in order."""
        raise NotImplementedError

    def stop(self) -> None:
        """Let the `next()` of another thread return soon, and end every later one with StopIteration."""
        self.stopped = True

    def close(self) -> None:
        """Give everything back; no thread may be in `next()` any more."""
        raise NotImplementedError


class InProcess(StepNode):
    """Reads and decodes when it is asked."""

    def __init__(self, setup: Setup, slots: Sequence[int], states: dict[int, SlotState], shape: BatchShape):
        super().__init__()
        self.slots = slots
        self.arrays = deque(Buffers(shape, KEPT).arrays)
        self.rows = shape.patch_rows
        self.producer = Producer(setup, slots, states)

    def stop(self) -> None:
        """No more steps; a wait for storage ends."""
        super().stop()
        self.producer.stop()

    def step(self) -> tuple[Arrays, list[SlotStep]]:
        """Raises UserError: of the data, or of the storage that they lie in."""
        arrays = self.arrays[0]
        self.arrays.rotate(-1)
        views = [slot_views(arrays, place, self.rows) for place in range(len(self.slots))]
        return arrays, self.producer.start(views)()

    def close(self) -> None:
        """Ends the decoding threads and closes the shards."""
        self.producer.close()


class FromWorkers(StepNode):
    """Worker w runs slots w, w + workers, ... of the rank; all are `prefetch` steps ahead.

    Step n lies in buffer n modulo their number, prefetch + KEPT: step n + prefetch overwrites that of n -
    KEPT.
    """

    def __init__(
        self,
        setup: Setup,
        slots: Sequence[int],
        states: dict[int, SlotState],
        shape: BatchShape,
        workers: int,
        prefetch: int,
    ):
        super().__init__()
        self.prefetch = prefetch
        self.buffers = Buffers(shape, prefetch + KEPT)
        self.places = [list(range(worker, len(slots), workers)) for worker in range(workers)]
        self.slots = slots
        self.workers: list[Worker] = []
        # Before multiprocessing's own shutdown, which would wait for workers that nobody asked to end.
        self.shutdown = multiprocessing.util.Finalize(self, close_all, (self.workers,), exitpriority=100)
        for number, places in enumerate(self.places):
            self.workers.append(Worker(number, setup, shape, self.buffers, self._assignment(places, states)))
        self.asked = self.given = 0

    def step(self) -> tuple[Arrays, list[SlotStep]]:
        """Raises UserError as `InProcess`, or RuntimeError for a worker that failed or died."""
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

    def stop(self) -> None:
        """No more steps; a worker that is asked for one meanwhile ends instead of answering."""
        super().stop()
        for worker in self.workers:
            worker.hang_up()

    def close(self) -> None:
        """Ends the workers and frees the shared memory."""
        self.shutdown()
        self.buffers.close()

    def _assignment(self, places: list[int], states: dict[int, SlotState]) -> Assignment:
        slots = [self.slots[place] for place in places]
        return Assignment(slots, places, {slot: states[slot] for slot in slots if slot in states})


class Supply:
    """The steps of a StepNode as the trainer takes them: pinned where this process uses a GPU, errors raised.

    Pinning copies, so a pinned step holds as long as somebody holds it, and the memory it came from is free
    at once.
    """

    def __init__(self, steps: StepNode, still_waiting: Callable[[], object] | None = None):
        """`still_waiting`: called every few seconds while a step takes long, by the thread that waits."""
        self.steps = steps
        self.still_waiting = still_waiting
        threads = torch.get_num_threads()
        self.puller = ThreadPoolExecutor(1, "pull", lambda: torch.set_num_threads(threads))
        self.node: BaseNode[Filled | Exception] = steps
        if torch.cuda.is_initialized():
            pinned = PinMemory(steps, "cuda", snapshot_frequency=0)
            self.node = Prefetcher(pinned, READY, snapshot_frequency=0)

    def next(self) -> Filled:
        """Raises what reading or decoding raised, RuntimeError for a worker that failed or died."""
        given = self._pull()
        if isinstance(given, Exception):
            raise given
        return given

    def _pull(self) -> Filled | Exception:
        if self.still_waiting is None:
            return next(self.node)
        pulled = self.puller.submit(next, self.node)
        while not wait([pulled], STILL_WAITING_S).done:
            self.still_waiting()
        return pulled.result()

    def close(self) -> None:
        """Ends the threads of the nodes and what makes the steps; nothing can be taken any more."""
        self.steps.stop()
        self.puller.shutdown()
        with contextlib.suppress(Exception):  # a thread that could not pin says so in `next`
            for _ in self.node:
                pass  # a node's thread ends once it has handed on the end
        self.steps.close()
