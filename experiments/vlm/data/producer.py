"""The slots of one process: plan each, decode, fill. Runs inside the trainer or inside a worker, with the
same result.

With threads, a slot is planned while the one before it is still decoding.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from experiments.vlm.data.batch_metrics import Views
from experiments.vlm.data.collate import Collator, FilledSlot
from experiments.vlm.data.rejects import Reject
from experiments.vlm.data.report import Tally
from experiments.vlm.data.setup import Setup
from experiments.vlm.data.slot import Slot, SlotPlan
from experiments.vlm.data.slot_state import SlotState
from experiments.vlm.data.sources.shard_cache import ShardCache
from experiments.vlm.data.storage.outages import Retry
from torchtitan.tools.disk import allow_open_files

SPARE_SHARDS = 32  # kept open besides three of each source for every slot: read, next, and still waited for


@dataclass
class SlotStep:
    """One slot of one step. Plain data."""

    filled: FilledSlot
    planned: bool  # False: nothing was left to plan
    rejects: list[Reject]
    state: SlotState  # right after this step


class Producer:
    """Plans and fills the slots of one process, a row of each in turn."""

    def __init__(self, setup: Setup, slots: Sequence[int], states: dict[int, SlotState]):
        """`states`: of slots that go on; the others start anew."""
        allow_open_files()
        self.cache = ShardCache(
            setup.open_shard,
            3 * len(slots) * len(setup.deals) + SPARE_SHARDS,
            Retry(setup.data.storage_timeout_s),
        )
        threads = setup.data.decode_threads
        self.pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None
        self.collator = Collator(self.cache, setup.plan, setup.tokenizer.pad_id, self.pool)
        self.slots = [Slot(number, setup, self.cache) for number in slots]
        self.tallies = {number: Tally() for number in slots}  # of what was delivered
        for slot in self.slots:  # all of them at one time
            slot.open_ahead(states[slot.number]["plan"] if slot.number in states else None)
        for slot in self.slots:
            if slot.number in states:
                state = states[slot.number]
                slot.seek(state["plan"])
                self.tallies[slot.number] = Tally(state["delivered"])

    def start(self, which: Sequence[int], views: Sequence[Views]) -> Callable[[], list[SlotStep]]:
        """Begin some slots' next rows: `views[i]` is filled with that of slot number `which[i]` of this
        process. What is returned waits for it.
        """
        started: list[tuple[SlotPlan, Callable[[], FilledSlot]]] = []
        done: list[SlotStep] = []
        for number, view in zip(which, views, strict=True):
            plan = self.slots[number].plan()
            started.append((plan, self.collator.start(plan, view)))
            if len(started) > 1:
                done.append(self._finish(*started.pop(0)))
        return lambda: done + [self._finish(*rest) for rest in started]

    def stop(self) -> None:
        """Let a thread that waits for the storage go, with Stopped."""
        self.cache.retry.end()

    def close(self) -> None:
        """Ends the decoding threads and lets go of the shards."""
        self.stop()
        self.cache.close()
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def _finish(self, plan: SlotPlan, finish: Callable[[], FilledSlot]) -> SlotStep:
        filled = finish()
        tally = self.tallies[plan.slot]
        for reject in filled.rejects:
            tally.reject(reject)
            if reject.kind == "samples":
                tally.count(reject.source, "read", -1)  # the plan took it for a good one
        for delivered in filled.delivered:
            for what, more in (
                ("samples", delivered.offset == 0),
                ("pieces", 1),
                ("images", len(delivered.image_sizes)),
            ):
                tally.count(delivered.source, what, int(more))
        for name, count in filled.counts.items():
            if name.startswith("tokens/"):
                tally.count(name.removeprefix("tokens/"), "tokens", count)
        state = SlotState(plan=plan.position, delivered=tally.snapshot(), epochs=plan.epochs)
        return SlotStep(filled, bool(plan.packed), plan.rejects + filled.rejects, state)
