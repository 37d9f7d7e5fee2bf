"""A planned row becomes arrays: images decoded into their patches, tokens, labels and indices written next to
them.

In: a SlotPlan, and views of one slot's part of the batch. Out: the views filled to the last element, and a
FilledSlot with the counts. Every other place holds its field's padding value, whatever was there before.

The plan stands. An image that fails only now leaves padding in its patches; its tokens are taken out, those
of its document that follow close up, and the padding comes after the document, which so stays in one piece.
"""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from experiments.vlm.batch import FIELDS, IGNORE, Delivered
from experiments.vlm.data.batch_metrics import Views, count_by_source, count_slot
from experiments.vlm.data.controls import Painted
from experiments.vlm.data.image import ImagePlan, decode, write_patches
from experiments.vlm.data.rejects import Reject, Rejected
from experiments.vlm.data.sample import PlannedImage
from experiments.vlm.data.slot import Packed, SlotPlan
from experiments.vlm.data.sources.shard_cache import Key


class Opened(Protocol):
    """Where images lie: sources.shard_cache.ShardCache, or a prompt's own."""

    def use(self, source: int, path: str, work: Callable[[Any], Any]) -> Any:
        """What `work` makes of an opened shard. Raises Rejected and what `work` raises."""


@dataclass
class FilledSlot:
    """What is in a slot now. Plain data."""

    slot: int
    counts: Counter[str] = field(default_factory=Counter)  # as in Batch.counts
    delivered: list[Delivered] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)  # met while decoding


class Collator:
    """Fills slots of one process. Not thread-safe itself; its pool's threads write to separate places."""

    def __init__(self, cache: Opened, plan: ImagePlan, pad_id: int, pool: Executor | None = None):
        """`pool`: threads that decode; without one the caller does."""
        self.cache = cache
        self.plan = plan
        self.pad_id = pad_id
        self.pool = pool

    def start(self, plan: SlotPlan, views: Views) -> Callable[[], FilledSlot]:
        """Begin to decode.

        What is returned waits for the pixels, writes the rest and reports what became of the samples.
        """
        decoding = [
            [self._submit(packed, number, views) for number in range(len(packed.places))]
            for packed in plan.packed
        ]
        return lambda: self._finish(plan, views, decoding)

    def _submit(self, packed: Packed, number: int, views: Views) -> Future:
        image, (row, first) = packed.sample.images[number], packed.places[number]
        span = slice(first, first + image.patches)
        targets = views["pixel_values"][row, span], views["grid_thw"][row, span]
        shard = packed.reference.source, packed.origin.shard
        if self.pool is None:
            return finished(self._decode(shard, image, *targets))
        return self.pool.submit(self._decode, shard, image, *targets)

    def _decode(
        self, shard: Key, image: PlannedImage, patches: np.ndarray, thw: np.ndarray
    ) -> Rejected | None:
        """Runs in a thread. None: it went well."""
        height, width = image.h * self.plan.patch_size, image.w * self.plan.patch_size
        locator = image.image.locator
        if isinstance(locator, Painted):
            pixels = locator.paint(height, width)
        else:
            try:
                pixels = self.cache.use(
                    *shard, lambda opened: decode(opened.load(image.image), height, width)
                )
            except Rejected as rejected:
                return rejected
        write_patches(pixels, self.plan, patches, thw)
        return None

    def _finish(self, plan: SlotPlan, views: Views, decoding: list[list[Future]]) -> FilledSlot:
        row = _Row(plan, views, self.plan.merge_size**2, self.pad_id)
        for packed, results in zip(plan.packed, decoding, strict=True):
            row.add(packed, [result.result() for result in results])
        return row.close()


def finished(result: Rejected | None) -> Future:
    """A future that is done."""
    future: Future = Future()
    future.set_result(result)
    return future


class _Row:
    """One slot that is being written, document by document."""

    def __init__(self, plan: SlotPlan, views: Views, merge: int, pad_id: int):
        self.views = views
        self.merge = merge  # patches of a visual token
        self.filled = FilledSlot(plan.slot)
        for name in (name for name in FIELDS if FIELDS[name].dims == "BS"):
            views[name][:] = pad_id if name == "tokens" else FIELDS[name].padding
        self.rows, self.length = views["grid_thw"].shape[:2]
        self.kept: list[tuple[int, int, int]] = []  # (row, first, end) of patches that hold an image
        self.cursor = 0

    def add(self, packed: Packed, failures: list[Rejected | None]) -> None:
        """A document at the place that was planned for it; without its images that failed, or not at all."""
        sample, origin = packed.sample, packed.origin
        start = self.cursor
        self.cursor += len(sample.tokens)
        for number, failure in enumerate(failures):
            if failure is not None:
                lost = None if origin.caption else sample.images[number].number
                self.filled.rejects.append(
                    Reject(origin.source, origin.shard, origin.key, failure.reason, failure.detail, lost)
                )
                if origin.caption:
                    return
        good = [number for number, failure in enumerate(failures) if failure is None]
        document = len(self.filled.delivered)
        tokens, index = self._without_lost(packed, good)
        self._write(start, document, tokens, sample.targets[index], self._visual_index(packed, good)[index])
        written = slice(start, start + len(tokens))
        self.views["source_ids"][written] = packed.reference.source
        self.kept += [
            (row, first, first + sample.images[number].patches)
            for number, (row, first) in enumerate(packed.places)
            if number in good
        ]
        sizes = [(sample.images[number].image.height, sample.images[number].image.width) for number in good]
        delivered = Delivered(
            0, document, origin.source, origin.shard, origin.key, sizes, packed.reference.offset
        )
        self.filled.delivered.append(delivered)
        self.filled.counts.update(count_by_source(delivered, self.views["labels"][written]))

    def close(self) -> FilledSlot:
        """Write padding into every patch that holds no image, and count."""
        cursor = dict.fromkeys(range(self.rows), 0)
        ends = [(row, self.length, self.length) for row in range(self.rows)]
        for row, first, end in sorted(self.kept + ends):
            for name in ("pixel_values", "grid_thw"):
                self.views[name][row, cursor[row] : first] = FIELDS[name].padding
            cursor[row] = end
        self.filled.counts.update(count_slot(self.views, self.filled.delivered))
        return self.filled

    def _without_lost(self, packed: Packed, good: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The sample's tokens that are used, and which those are."""
        used = np.ones(len(packed.sample.tokens), bool)
        for number, image in enumerate(packed.sample.images):
            if number not in good:
                used[image.start : image.start + image.visual_tokens + 2] = False
        index = np.flatnonzero(used)
        return packed.sample.tokens[index], index

    def _visual_index(self, packed: Packed, good: list[int]) -> np.ndarray:
        index = np.full(len(packed.sample.tokens), FIELDS["visual_index"].padding, np.int64)
        for number in good:
            image, (row, first) = packed.sample.images[number], packed.places[number]
            visual, patches = image.visual_tokens, image.h * image.w // self.merge
            begin = (row * self.length + first) // self.merge
            # What extra cells become lies behind the patches, and comes before them among the tokens.
            cells = np.roll(np.arange(begin, begin + visual), visual - patches)
            index[image.start + 1 : image.start + 1 + visual] = cells
        return index

    def _write(
        self, start: int, document: int, tokens: np.ndarray, targets: np.ndarray, visual_index: np.ndarray
    ) -> None:
        end = start + len(tokens)
        self.views["tokens"][start:end] = tokens
        self.views["labels"][start : end - 1] = np.where(targets[1:], tokens[1:], IGNORE)
        self.views["positions"][start:end] = np.arange(len(tokens))
        self.views["document_ids"][start:end] = document
        self.views["visual_index"][start:end] = visual_index
