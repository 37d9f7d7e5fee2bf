"""Memory for a few batches, which workers write and the trainer reads without a copy.

It is an anonymous file in memory (a temporary file where the system has none), handed to workers as an open
descriptor: it needs no room in /dev/shm, and goes with the last process that holds it, however that ends.
"""

import mmap
import os
import tempfile
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np

from experiments.vlm.batch import FIELDS, BatchShape

ALIGNMENT = 4096
Arrays = dict[str, np.ndarray]


def batch_bytes(shape: BatchShape) -> int:
    """Bytes of one batch, each field at its own aligned place."""
    return sum(_aligned(_bytes(shape, name)) for name in shape.fields)


class Buffers:
    """`count` batches of `shape`. `arrays[i]`: the fields of one of them. A process that is started with it
    shares the memory.
    """

    def __init__(self, shape: BatchShape, count: int, descriptor: int | None = None):
        """`descriptor`: of memory that another process made; without one it is made here."""
        self.shape = shape
        size = batch_bytes(shape)
        self.descriptor = _anonymous(size * count) if descriptor is None else descriptor
        # The arrays keep the mapping alive, and it needs the descriptor no longer.
        memory = mmap.mmap(self.descriptor, size * count)
        self.arrays = [_fields(memory, shape, batch * size) for batch in range(count)]

    def __reduce__(self) -> tuple[Any, ...]:
        return _shared, (self.shape, len(self.arrays), DupFd(self.descriptor))

    def close(self) -> None:
        """Give the memory back once nobody holds an array of it."""
        self.arrays = []
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _shared(shape: BatchShape, count: int, descriptor: Any) -> Buffers:
    return Buffers(shape, count, descriptor.detach())


def slot_views(arrays: Arrays, index: int, patch_rows: int) -> Arrays:
    """The part of slot `index`: [S] of a token field, [patch_rows, L, ...] of a patch field."""
    return {
        name: array[index * patch_rows : (index + 1) * patch_rows]
        if FIELDS[name].dims[0] == "N"
        else array[index]
        for name, array in arrays.items()
    }


def _fields(memory: mmap.mmap, shape: BatchShape, offset: int) -> Arrays:
    arrays = {}
    for name, field in shape.fields.items():
        arrays[name] = np.ndarray(shape.of(name), field.dtype, memory, offset)
        offset += _aligned(_bytes(shape, name))
    return arrays


def _bytes(shape: BatchShape, name: str) -> int:
    return int(np.prod(shape.of(name), dtype=np.int64)) * np.dtype(FIELDS[name].dtype).itemsize


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _anonymous(size: int) -> int:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("batches", os.MFD_CLOEXEC)
    else:
        descriptor, path = tempfile.mkstemp(prefix="batches-")
        os.unlink(path)
    os.ftruncate(descriptor, size)
    return descriptor
