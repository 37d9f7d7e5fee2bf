"""A rank's forwards as nodes of torchdata: from its own process or from workers that run ahead, pinned for a
GPU.

    InProcess or FromWorkers     the forwards of all steps, one after the other, in memory that is used again
    PinMemory, Prefetcher        where there is a GPU: copies in pinned memory, made alongside training

A forward (a microbatch) is what memory is counted in. The trainer has to know the tokens of a whole step
before its first forward, so there are always those of a step, and a few more: not steps that are ready.

A forward carries its own state (SlotStep.state), so that of a node is empty: a snapshot of nodes could only
be resumed at the same number of workers.
"""

import contextlib
import math
import multiprocessing.util
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor
from torchdata.nodes import BaseNode, PinMemory, Prefetcher

from experiments.vlm.batch import BatchShape
from experiments.vlm.data.producer import Producer, SlotStep
from experiments.vlm.data.setup import Setup
from experiments.vlm.data.shared_memory import Arrays, Buffers, slot_views
from experiments.vlm.data.slot_state import SlotState
from experiments.vlm.data.workers import Assignment, Worker, close_all
from torchtitan.config.errors import HangingRead
from torchtitan.distributed.collectives import STILL_WAITING_S

COPIED = 2  # forwards that hold where they are copied at once: the one that is copied, and the one before it

# A forward: its fields [B, ...] and [N, ...], and a SlotStep for each of its slots in order.
Filled = tuple[dict[str, Tensor], list[SlotStep]]


class ForwardNode(BaseNode[Filled | Exception]):
    """Forwards without end. A forward's tensors hold until it is given back, or `kept` more were asked for.

    An error is given in place of a forward: torchdata would raise another, with its text inside a traceback.
    """

    def __init__(self, shape: BatchShape, kept: int, ahead: int):
        """shape: of a forward. ahead: forwards that there is memory for, besides those that are kept."""
        super().__init__()
        self.shape, self.kept = shape, kept
        self.buffers = Buffers(shape, kept + ahead)
        self.given = self.returned = 0
        self.stopped = False

    def next(self) -> Filled | Exception:
        """The next forward, or the error that it met. Raises StopIteration after `stop`."""
        if self.stopped:
            raise StopIteration
        try:
            self.give_back(self.given - self.kept)
            arrays = self.buffers.arrays[self.given % len(self.buffers.arrays)]
            steps = self.fill(arrays)
        except Exception as error:
            return error
        self.given += 1
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, steps

    def give_back(self, number: int) -> None:
        """The memory of the forwards up to that number, from 0, may be written again."""
        self.returned = max(self.returned, number + 1)

    def get_state(self) -> dict:
        """Empty: a forward carries its own state."""
        return {}

    def fill(self, arrays: Arrays) -> list[SlotStep]:
        """Wait for the next forward to be in these arrays; a SlotStep for each of its slots in order."""
        raise NotImplementedError

    def stop(self) -> None:
        """Let the `next()` of another thread return soon, and end every later one with StopIteration."""
        self.stopped = True

    def close(self) -> None:
        """Give everything back; no thread may be in `next()` any more."""
        self.buffers.close()


class InProcess(ForwardNode):
    """Reads and decodes when it is asked."""

    def __init__(
        self,
        setup: Setup,
        slots: Sequence[int],
        states: dict[int, SlotState],
        shape: BatchShape,
        kept: int,
    ):
        super().__init__(shape, kept, ahead=0)
        self.producer = Producer(setup, slots, states)
        self.forwards = len(slots) // shape.slots

    def stop(self) -> None:
        """Ends a wait for the storage, too."""
        super().stop()
        self.producer.stop()

    def fill(self, arrays: Arrays) -> list[SlotStep]:
        """Raises UserError: of the data, or of the storage that they lie in."""
        size = self.shape.slots
        first = self.given % self.forwards * size
        views = [slot_views(arrays, row, self.shape.patch_rows) for row in range(size)]
        return self.producer.start(range(first, first + size), views)()

    def close(self) -> None:
        """Ends the decoding threads, too."""
        self.producer.close()
        super().close()


class FromWorkers(ForwardNode):
    """Worker w runs slots w, w + workers, ... of the rank. Forward n lies in buffer n modulo their number,
    and is asked for as soon as that is free.
    """

    def __init__(
        self,
        setup: Setup,
        slots: Sequence[int],
        states: dict[int, SlotState],
        shape: BatchShape,
        kept: int,
        workers: int,
        prefetch: int,
    ):
        """prefetch: how many forwards each worker is ahead, at least."""
        super().__init__(shape, kept, prefetch * -(-workers // shape.slots))
        self.workers: list[Worker] = []
        # Before multiprocessing's own shutdown, which would wait for workers that nobody asked to end.
        self.shutdown = multiprocessing.util.Finalize(self, close_all, (self.workers,), exitpriority=100)
        # of each forward of a step: which worker runs which of its rows
        self.parts: list[dict[int, list[int]]] = [{} for _ in range(len(slots) // shape.slots)]
        for number in range(workers):
            places = range(number, len(slots), workers)
            own = list(slots[number::workers])
            assigned = Assignment(own, places, {slot: states[slot] for slot in own if slot in states})
            self.workers.append(Worker(number, setup, self.buffers, assigned))
            for place in places:
                self.parts[place // shape.slots].setdefault(number, []).append(place % shape.slots)
        self.asked = 0

    def give_back(self, number: int) -> None:
        """Workers write there soon."""
        super().give_back(number)
        self._ask()
        for worker in self.workers:
            worker.collect()

    def _ask(self) -> None:
        while self.asked < self.returned + len(self.buffers.arrays):
            forward = self.asked % len(self.parts)
            for worker in self.parts[forward]:
                self.workers[worker].ask(self.asked % len(self.buffers.arrays), forward)
            self.asked += 1

    def fill(self, arrays: Arrays) -> list[SlotStep]:
        """Raises UserError as `InProcess`, or RuntimeError for a worker that failed or died."""
        steps: dict[int, SlotStep] = {}
        for worker, rows in self.parts[self.given % len(self.parts)].items():
            steps |= dict(zip(rows, self.workers[worker].answer(), strict=True))
        return [steps[row] for row in range(self.shape.slots)]

    def stop(self) -> None:
        """Hangs up on the workers, too."""
        super().stop()
        for worker in self.workers:
            worker.hang_up()

    def close(self) -> None:
        """Ends the workers, too."""
        self.shutdown()
        super().close()


def is_pinned() -> bool:
    """Whether forwards are copied, since this process uses a GPU."""
    return torch.cuda.is_initialized()


class Supply:
    """The forwards of a node as the trainer takes them: pinned where this process uses a GPU, errors raised.

    Pinning copies, so a pinned forward holds as long as somebody holds it, and the memory it came from is
    free at once.
    """

    def __init__(
        self,
        forwards: ForwardNode,
        ready: int,
        still_waiting: Callable[[], object] = lambda: None,
        longest_s: float = math.inf,
    ):
        """ready: pinned forwards that wait, besides the one that PinMemory's own thread has made.
        `still_waiting`: called every few seconds while one takes long, by the thread that waits; for
        `longest_s` seconds at most.
        """
        self.forwards, self.taken = forwards, 0
        self.still_waiting, self.longest_s, self.hangs = still_waiting, longest_s, False
        threads = torch.get_num_threads()
        self.puller = ThreadPoolExecutor(1, "pull", lambda: torch.set_num_threads(threads))
        self.node: BaseNode[Filled | Exception] = forwards
        if is_pinned():
            pinned = PinMemory(forwards, "cuda", snapshot_frequency=0)
            self.node = Prefetcher(pinned, ready, snapshot_frequency=0)

    def next(self) -> Filled:
        """Raises what reading raised, RuntimeError for a lost worker, HangingRead."""
        given = self._pull()
        if isinstance(given, Exception):
            raise given
        self.taken += 1
        return given

    def give_back(self, number: int) -> None:
        """The trainer is done with the forwards up to that number, from 0; later `next` say so for it."""
        if self.node is self.forwards and not self.forwards.stopped:
            self.forwards.give_back(number)

    def _pull(self) -> Filled | Exception:
        pulled, began = self.puller.submit(next, self.node), time.monotonic()
        while not wait([pulled], STILL_WAITING_S).done:
            if time.monotonic() - began > self.longest_s:
                self.hangs = True
                raise HangingRead(
                    f"no data for {self.longest_s:.0f} s, and no error either: a read hangs, or takes longer "
                    "than data.storage_timeout_s and comm.train_timeout_seconds allow together"
                )
            self.still_waiting()
        return pulled.result()

    def close(self) -> None:
        """Ends the threads of the nodes and what makes the steps; nothing can be taken any more."""
        self.forwards.stop()
        if self.hangs and isinstance(self.forwards, InProcess):
            return self.puller.shutdown(wait=False)  # its thread is inside a read, and nobody can end that
        self.puller.shutdown()
        with contextlib.suppress(Exception):  # a thread that could not pin says so in `next`
            for _ in self.node:
                pass  # a node's thread ends once it has handed on the end
        self.forwards.close()
