"""The steps of one data-parallel rank: slots r * G / ranks ..., in batches of the contract.

In: a job. Out: Steps, whose batches are host tensors (experiments/vlm/batch.py), and a state after each.

What a step holds depends on the configuration and the data alone: not on ranks, workers, prefetching or
restarts. Workers (data.num_workers processes) run ahead by data.prefetch steps; without them the trainer's
own process reads and decodes. One of the ranks that hold the same slots reads for all (read_once.py).

A step's tensors lie in memory that is used again: they hold until the next `next()`, and those of `once()`
until the next batch is asked for. Where the process uses a GPU they are pinned copies, made alongside
training (prefetch.py), and hold as long as somebody holds them.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from experiments.vlm.batch import Batch
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.data.batch_metrics import names_by_source, rejected_name
from experiments.vlm.data.good_sample import require_good_samples
from experiments.vlm.data.prefetch import COPIED, FromWorkers, InProcess, Supply, is_pinned
from experiments.vlm.data.producer import SlotStep
from experiments.vlm.data.ranks import Ranks, shards_of
from experiments.vlm.data.reject_log import RejectLog
from experiments.vlm.data.report import Tally, check_bad_fraction, rejected_line, report, tally_of
from experiments.vlm.data.resume import from_checkpoint, refuse, with_new_shards
from experiments.vlm.data.setup import Setup, Split, make_setup, order_facts, shape_of
from experiments.vlm.data.slot_state import SlotState, read_states, save_states, slot_key
from experiments.vlm.data.sources.listing import to_text
from experiments.vlm.data.sources.shards import needs_copy
from experiments.vlm.data.storage.fetch import about_failures
from experiments.vlm.data.storage.file_cache import file_cache
from experiments.vlm.parallelism.read_once import ReadOnce
from torchtitan.components.loader import Agree
from torchtitan.components.tokenizer import Tokenizer
from torchtitan.config.errors import DataError, UserError
from torchtitan.distributed.slot_group import SlotGroup
from torchtitan.tools.logging import logger
from torchtitan.tools.signals import StopAsked, stop_asked


def agree_alone(ranks: int, has_data: bool | None, error: UserError | None = None) -> bool:
    """As `agree` where nobody else is there to ask."""
    if error is not None:
        raise error
    if has_data is None and stop_asked():
        raise StopAsked
    return bool(has_data) or ranks > 1


@dataclass
class Step:
    """What an optimizer step takes, and where to go on after it."""

    batches: list[Batch]  # as many as accumulation steps
    # this rank's slots right after this step; none where another rank reads them
    state: Callable[[], dict[str, bytes]]
    give_back: Callable[[int], None] = lambda number: None  # the batch of that number is done with

    def once(self) -> Iterator[Batch]:
        """The batches in order; each is done with when the next is asked for."""
        for number, batch in enumerate(self.batches):
            yield batch
            self.give_back(number)


class Loader:
    """Steps for rank `rank` of `ranks` data-parallel ranks.

    With the document that batch.py shows, and S = L = 16:

    >>> loader = Loader(job, tokenizer)
    >>> batch = next(loader).batches[0]
    >>> {name: tuple(tensor.shape) for name, tensor in batch.tensors.items()}
    {'tokens': (1, 16), 'labels': (1, 16), 'positions': (1, 16), 'document_ids': (1, 16),
     'pixel_values': (1, 16, 768), 'grid_thw': (1, 16, 3), 'visual_index': (1, 16),
     'source_ids': (1, 16)}
    >>> [batch.counts[name] for name in ("tokens", "loss_tokens", "patches", "images")]
    [14, 6, 12, 2]
    >>> batch.samples[0].source, batch.samples[0].image_sizes
    ('obelics', [(32, 32), (32, 64)])
    >>> loader.close()

    It goes on where it was with every `iter()`; to read a split again, open another. Data that ends
    (data.epochs, sources without repeat, validation) ends on every rank with the same step: once no slot of
    any rank has data. `agree` is asked once a step: see components/loader.py. Several ranks without it get
    padding without end instead.

    Raises DataError where a source has no good sample: of training, and of the held-out split of later.
    """

    def __init__(
        self,
        job: VLMJobConfig,
        tokenizer: Tokenizer,
        *,
        rank: int = 0,
        ranks: int = 1,
        split: Split = "train",
        control: str | None = None,
        agree: Agree | None = None,
        group: SlotGroup | None = None,
    ):
        self.job, self.split = job, split
        local, total = job.training.local_batch_size, job.training.global_batch_size
        if split == "validation" or total == -1:
            total = local * ranks
        assert total % (local * ranks) == 0, "the configuration check lets no such batch through"
        self.slots = range(rank * total // ranks, (rank + 1) * total // ranks)
        self.ranks = Ranks(together=agree is not None)
        self._use(make_setup(job, tokenizer, split, total, control, shards_of(job, split, self.ranks)))
        self.shape = shape_of(self.setup, local)
        self.may_end = all(deal.epochs is not None for deal in self.setup.deals)
        self.agree = agree or partial(agree_alone, ranks)
        self.still_waiting = partial(self.agree, None)
        self.group = ReadOnce(group, job, self.shape) if group else None
        self.reads = self.group is None or self.group.leads
        if split == "train":
            if any(needs_copy(deal.shards[0]) for deal in self.setup.deals):
                self.ranks.wait_together(file_cache(job.data).warn_if_small)
            setups = [self.setup]
            if job.validation.enable:
                shards = shards_of(job, "validation", self.ranks)
                setups.append(make_setup(job, tokenizer, "validation", total, shards=shards))
            looked_at = setups if self.reads else []
            self.ranks.wait_together(lambda: require_good_samples(looked_at, self.slots.start))
        # The controls show the samples of a validation again: what is wrong with them has been logged.
        folder = Path(job.job.dump_folder) / "rejects" if job.job.dump_folder else None
        self.log = RejectLog(folder, rank) if control is None else None
        self.states: dict[int, SlotState] = {}
        self.supply: Supply | None = None
        self.over = False
        self.warned_of_addresses = False
        self.steps = 0  # asked for since a start

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Step:
        """Raises on all ranks alike DataError where the data cannot carry the run, StorageError where their
        storage stays away, and StopAsked where a signal comes meanwhile; on one RuntimeError where a worker
        failed.
        """
        if self.over:
            raise StopIteration
        freq = self.job.data.new_shards_freq if self.split == "train" and self.job.data.join_new_shards else 0
        if freq and self.steps and self.steps % freq == 0:
            self._let_new_shards_join()
        self.steps += 1
        try:
            step, has_data = self._take() if self.reads else (None, False)
        except UserError as error:
            self.agree(True, error)
            raise
        if not self.agree(has_data):
            self.over = True
            raise StopIteration
        if self.group is None:
            assert step is not None
            return step
        batches = self.group.share(step.batches if step else None)
        return replace(step, batches=batches) if step else Step(batches, dict)

    def _take(self) -> tuple[Step, bool]:
        """The next step, and whether anything is in it."""
        if self.supply is None:
            self.supply = self._start()
        supply, first = self.supply, self.supply.taken
        filled = [supply.next() for _ in range(len(self.slots) // self.shape.slots)]
        steps = [step for _, of_forward in filled for step in of_forward]
        self._log_rejects(steps)
        has_data = any(step.planned for step in steps)
        if not self.may_end and not has_data:
            raise DataError(
                f"slots {self.slots.start} to {self.slots.stop - 1} get no good sample of "
                f"{', '.join(self.names)}, ever: the sources have fewer samples than slots, and without "
                "shuffling each slot reads the same ones; set shuffle, or lower training.global_batch_size"
            )
        self.states = {step.filled.slot: step.state for step in steps}
        state = partial(save_states, self.states, self.facts, self.shards)
        batches = [self._batch(tensors, of_forward) for tensors, of_forward in filled]
        return Step(batches, state, lambda number: supply.give_back(first + number)), has_data

    def state_dict(self) -> dict[str, bytes]:
        """After the last step that was handed out; empty before the first, and where another rank reads."""
        return save_states(self.states, self.facts, self.shards) if self.reads else {}

    def load_state_dict(self, state: Mapping[str, bytes]) -> None:
        """Go on from a `state_dict` with all of `slot_keys()`. Raises ConfigError where the data changed."""
        self.close()
        self.states, self.over = {}, False
        if not state:
            return
        entries = read_states(state)
        continued = from_checkpoint(entries, self.setup, self.slots, self.reads, self.ranks)
        if continued.changes and not self.job.data.resume_changed_data:
            raise refuse(continued.changes)
        if continued.changes:
            changes = "; ".join(continued.changes)
            logger.warning(f"the data starts anew (data.resume_changed_data): {changes}")
            return
        for line in continued.joined:
            logger.info(line)
        self._use(replace(self.setup, deals=continued.now))
        self.states = {slot: entries[slot]["slot"] for slot in self.slots}

    def _use(self, setup: Setup) -> None:
        self.setup = setup
        self.facts = order_facts(setup) if self.split == "train" else {}
        self.shards = to_text(setup.deals) if self.split == "train" and self.slots.start == 0 else ""
        paths = [shard for deal in setup.deals for shard in deal.shards]
        self.shared_shards = len(set(paths)) < len(paths)

    def _let_new_shards_join(self) -> None:
        """Go on as if the run had ended here: what is read ahead of the trainer is read again."""
        deals = self.setup.deals
        continued = with_new_shards(self.job, deals, self.states, self.ranks)
        if continued.changes:
            logger.warning(f"no new shards join: {'; '.join(continued.changes)}")
            return
        for line in continued.joined:
            logger.info(line)
        if continued.now != deals:
            self.close()
            self._use(replace(self.setup, deals=continued.now))

    def slot_keys(self) -> list[str]:
        """The keys of `state_dict` that this rank's slots have: "slot_000017" for slot 17."""
        return [slot_key(slot) for slot in self.slots]

    def report(self) -> dict[str, Any]:
        """What became of the samples of this rank's slots so far; data_report.py adds up all ranks."""
        return report(self.states.values())

    @staticmethod
    def summary(report: Mapping[str, Any]) -> str:
        """What was rejected, in one line; empty where nothing was. `report`: of one rank, or merged."""
        return rejected_line(report["sources"])

    def close(self) -> None:
        """Ends the workers, and frees their memory; the position stays."""
        if self.supply is not None:
            self.supply.close()
            self.supply = None

    @property
    def names(self) -> list[str]:
        """The sources, in the order of the configuration."""
        return [deal.name for deal in self.setup.deals]

    def _start(self) -> Supply:
        data, slots = self.job.data, len(self.slots)
        workers = min(data.num_workers, slots)
        setup = self.setup
        if data.num_workers > workers > 0:
            # A slot is one stream, so more processes than slots could only wait: they become threads.
            threads = data.decode_threads * data.num_workers // workers
            setup = replace(setup, data=replace(data, decode_threads=threads))
            logger.info(
                f"data.num_workers = {data.num_workers} for {slots} slots a rank: {workers} workers, "
                f"{threads} threads each"
            )
        forwards = slots // self.shape.slots
        kept = COPIED if is_pinned() else forwards  # the trainer takes those of a step at once
        place = setup, self.slots, self.states, self.shape, kept
        nodes = FromWorkers(*place, workers, data.prefetch) if workers else InProcess(*place)
        longest_s = data.storage_timeout_s + self.job.comm.train_timeout_seconds
        return Supply(nodes, forwards, self.still_waiting, longest_s)

    def _log_rejects(self, steps: list[SlotStep]) -> None:
        rejects = [reject for step in steps for reject in step.rejects]
        if rejects and self.log is not None:
            self.log.write(rejects, self._deals_again(steps))
        if not self.warned_of_addresses and any(reject.reason == "image_fetch" for reject in rejects):
            self.warned_of_addresses = True
            logger.warning(about_failures(self.job.data))
        allowed = self.setup.max_bad_fraction
        if rejects and allowed < 1:
            total = Tally()
            for step in steps:
                total.add(tally_of(step.state))
            check_bad_fraction(total, allowed)

    def _deals_again(self, steps: list[SlotStep]) -> bool:
        """Whether another rank may have met the same: in a later epoch, or as two sources share a shard."""
        deals = self.setup.deals
        return self.shared_shards or any(
            deal.epoch(step.filled.slot, reader[0]) > 0
            for step in steps
            for deal, reader in zip(deals, step.state["plan"]["readers"], strict=True)
        )

    def _batch(self, tensors: dict[str, Tensor], steps: list[SlotStep]) -> Batch:
        counts = Counter(dict.fromkeys(names_by_source(self.names), 0))
        samples = []
        for row, step in enumerate(steps):
            counts.update(step.filled.counts)
            counts.update(rejected_name(reject.reason) for reject in step.rejects)
            samples += [replace(delivered, row=row) for delivered in step.filled.delivered]
        epochs = {name: sum(step.state["epochs"][name] for step in steps) for name in self.names}
        return Batch(tensors, dict(counts), samples, epochs)
