"""What was delivered, for programs: a JSON line a sample, and one a slot with a hash of its tensors."""

import hashlib
import json
from collections.abc import Iterator

from experiments.vlm.batch import FIELDS, Batch


def lines(batch: Batch, step: int, slots: list[int]) -> Iterator[str]:
    """`slots[row]`: the number of that row's slot.

    {"step", "slot", "source", "shard", "key", "offset", "document"} and {"step", "slot", "hash"}
    """
    for row, slot in enumerate(slots):
        for sample in (sample for sample in batch.samples if sample.row == row):
            named = {name: getattr(sample, name) for name in ("source", "shard", "key", "offset", "document")}
            yield json.dumps({"step": step, "slot": slot} | named)
        yield json.dumps({"step": step, "slot": slot, "hash": slot_hash(batch, row, len(slots))})


def slot_hash(batch: Batch, row: int, slots: int) -> str:
    """SHA-256 over the slot's part of every tensor, in the order of the batch contract."""
    digest = hashlib.sha256()
    for name in (name for name in FIELDS if name in batch.tensors):
        tensor = batch.tensors[name]
        rows = len(tensor) // slots
        digest.update(tensor[row * rows : (row + 1) * rows].numpy().tobytes())
    return digest.hexdigest()
