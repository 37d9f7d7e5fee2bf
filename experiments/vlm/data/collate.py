"""A planned row becomes arrays: images decoded into their patches, tokens, labels and indices written next to
them.

In: a SlotPlan, and views of one slot's part of the batch. Out: the views filled to the last element, and a
FilledSlot with the counts. Every other place holds its field's padding value, whatever was there before.

The plan stands. An image that fails only now leaves padding in its patches; its tokens are taken out, those
of its document that follow close up, and the padding comes after the document, which so stays in one piece.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from experiments.vlm.batch import FIELDS, IGNORE, PLACING, Delivered
from experiments.vlm.data.batch_metrics import Views, count_by_source, count_slot
from experiments.vlm.data.controls import Painted
from experiments.vlm.data.image import decode_views, write_patches
from experiments.vlm.data.image_layout import NEWLINE
from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.data.lookahead import Place
from experiments.vlm.data.rejects import Reject, Rejected
from experiments.vlm.data.sample import PlannedImage
from experiments.vlm.data.slot import Packed, SlotPlan
from experiments.vlm.data.sources.shard_cache import Key

Decoded = Callable[[], Rejected | None]  # waits for an image; what was wrong with it, if anything was


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
        """Begin to decode. What is returned waits for the pixels, writes the rest and counts."""
        decoding = [
            [self._submit(packed, image, places, views) for image, places in packed.placed()]
            for packed in plan.packed
        ]
        return lambda: self._finish(plan, views, decoding)

    def _submit(self, packed: Packed, image: PlannedImage, places: list[Place], views: Views) -> Decoded:
        targets = [
            (
                views["pixel_values"][row, first : first + view.cells],
                views["grid_thw"][row, first : first + view.cells],
            )
            for view, (row, first) in zip(image.layout.views, places, strict=True)
        ]
        shard = packed.reference.source, packed.origin.shard
        if self.pool is not None:
            return self.pool.submit(self._decode, shard, image, targets).result
        failure = self._decode(shard, image, targets)
        return lambda: failure

    def _decode(
        self, shard: Key, image: PlannedImage, targets: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> Rejected | None:
        """Runs in a thread. None: it went well."""
        locator, patch = image.image.locator, self.plan.patch_size
        if isinstance(locator, Painted):
            pictures = [locator.paint(view.h * patch, view.w * patch) for view in image.layout.views]
        else:
            try:
                pictures = self.cache.use(
                    *shard, lambda opened: decode_views(opened.load(image.image), image.layout, self.plan)
                )
            except Rejected as rejected:
                return rejected
        for pixels, (patches, thw) in zip(pictures, targets, strict=True):
            write_patches(pixels, self.plan, patches, thw)
        return None

    def _finish(self, plan: SlotPlan, views: Views, decoding: list[list[Decoded]]) -> FilledSlot:
        row = _Row(plan, views, self.plan.merge_size**2, self.pad_id)
        for packed, results in zip(plan.packed, decoding, strict=True):
            row.add(packed, [result() for result in results])
        return row.close()


class _Row:
    """One slot that is being written, document by document."""

    def __init__(self, plan: SlotPlan, views: Views, merge: int, pad_id: int):
        self.views = views
        self.merge = merge  # patches of a visual token
        self.filled = FilledSlot(plan.slot)
        for name in (name for name in views if FIELDS[name].dims.startswith("BS")):
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
        visual = {name: values[index] for name, values in self._visual(packed, good).items()}
        self._write(start, document, tokens, sample.targets[index], visual)
        written = slice(start, start + len(tokens))
        self.views["source_ids"][written] = packed.reference.source
        self.kept += [
            (row, first, first + view.cells)
            for number, (image, places) in enumerate(packed.placed())
            for view, (row, first) in zip(image.layout.views, places, strict=True)
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
                used[image.start : image.end] = False
        index = np.flatnonzero(used)
        return packed.sample.tokens[index], index

    def _visual(self, packed: Packed, good: list[int]) -> dict[str, np.ndarray]:
        """The fields that say which visual tokens each token is made of."""
        t, placed = len(packed.sample.tokens), packed.placed()
        found = {
            name: np.full((t, *self.views[name].shape[1:]), FIELDS[name].padding, FIELDS[name].dtype)
            for name in PLACING
            if name in self.views
        }
        for number in good:
            image, places = placed[number]
            # where in the slot each of the image's own visual tokens lies
            own = [
                np.arange(view.cells // self.merge) + (row * self.length + first) // self.merge
                for view, (row, first) in zip(image.layout.views, places, strict=True)
            ]
            span, rows = slice(image.start, image.end), np.concatenate(own)
            found["visual_index"][span] = self._in_table(image.layout.tokens, rows)
            if "visual_taps" in found:
                numbers, weights = image.layout.taps()
                found["visual_taps"][span] = taps = self._in_table(numbers, rows)
                found["tap_weights"][span] = weights * (taps >= 0)
        return found

    def _in_table(self, numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Rows of the slot's visual table for `numbers` as in Layout.tokens. `rows`: the image's own."""
        padding, newline = FIELDS["visual_index"].padding, self.rows * self.length // self.merge
        others = np.where(numbers == NEWLINE, newline, padding)
        return np.where(numbers >= 0, rows[np.maximum(numbers, 0)], others)

    def _write(
        self,
        start: int,
        document: int,
        tokens: np.ndarray,
        targets: np.ndarray,
        visual: dict[str, np.ndarray],
    ) -> None:
        end = start + len(tokens)
        self.views["tokens"][start:end] = tokens
        self.views["labels"][start : end - 1] = np.where(targets[1:], tokens[1:], IGNORE)
        self.views["positions"][start:end] = np.arange(len(tokens))
        self.views["document_ids"][start:end] = document
        for name, values in visual.items():
            self.views[name][start:end] = values
