"""The loader's work, stage by stage, on one thread: CPU seconds of each, for benchmarks/data_loading.py."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np

from benchmarks.turns import Counts
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.data import image as image_module
from experiments.vlm.data.collate import Collator
from experiments.vlm.data.image import decode, probe, write_patches
from experiments.vlm.data.setup import make_setup, shape_of
from experiments.vlm.data.shared_memory import Buffers, slot_views
from experiments.vlm.data.slot import Packed, Slot
from experiments.vlm.data.sources.shard_cache import ShardCache
from experiments.vlm.data.storage.outages import Retry
from torchtitan.components.tokenizer import load_tokenizer


class Stages:
    def __init__(self, job: VLMJobConfig, tokenizer: str, images: int):
        self.images, self.data = images, job.data
        setup = make_setup(job, load_tokenizer(tokenizer), "train", 1)
        self.cache = ShardCache(setup.open_shard, 64, Retry(setup.data.storage_timeout_s))
        self.slot = Slot(0, setup, self.cache)
        self.collator = Collator(self.cache, setup.plan, setup.tokenizer.pad_id)
        shape = shape_of(setup, 1)
        self.views = slot_views(Buffers(shape, 1).arrays[0], 0, self.data.patch_rows)
        self.seconds: dict[str, float] = defaultdict(float)
        for _ in range(4):  # until the look-ahead is full
            self.slot.plan()

    def prepare(self) -> None:
        self.seconds.clear()

    def run(self) -> Counts:
        self.prepare()
        counts: Counter = Counter()
        while counts["images"] < self.images:
            plan = self._timed("plan (reads headers and texts)", self.slot.plan)
            finish = self.collator.start(plan, self.views)
            for packed in plan.packed:
                self._image(packed)
            counts.update(self._timed("write tokens and indices", finish).counts)
        return {"images": float(counts["images"])} | {
            f"stage {name}": seconds for name, seconds in self.seconds.items()
        }

    def workers(self) -> list[int]:
        return []

    def _timed(self, name: str, call: Callable, *arguments):
        started = time.thread_time()
        result = call(*arguments)
        self.seconds[name] += time.thread_time() - started
        return result

    def _image(self, packed: Packed) -> None:
        planned, (row, first) = packed.sample.images[0], packed.places[0]
        plan, (view,) = self.collator.plan, planned.layout.views
        span = slice(first, first + view.h * view.w)
        target = view.h * plan.patch_size, view.w * plan.patch_size
        shard = packed.reference.source, packed.origin.shard
        data = self._timed("read", self.cache.use, *shard, lambda opened: opened.load(planned.image))
        height, width = self._timed("probe (once more in planning)", probe, data)
        pixels = self._timed("decode", self._decode, data, height, width)
        self._timed("resize", image_module._resize, pixels, (height, width), target)
        image = self._timed("decode and resize as the loader calls it", decode, data, *target)
        patches, thw = self.views["pixel_values"][row, span], self.views["grid_thw"][row, span]
        self._timed("patches", write_patches, image, plan, patches, thw)

    @staticmethod
    def _decode(data: bytes, height: int, width: int) -> np.ndarray:
        return image_module.simplejpeg.decode_jpeg(data, buffer=image_module._buffer(height * width * 3))
