"""Garbage collection when we say so: else each rank pauses at another moment, and all wait for it."""

import gc


class GarbageCollection:
    """Python's own collection is off until `close`; every `freq` steps the young are collected."""

    def __init__(self, freq: int):
        self.freq = freq
        gc.collect()
        gc.disable()

    def after_step(self, step: int) -> None:
        """Collects the young generations where `freq` says so."""
        if step % self.freq == 0:
            gc.collect(1)

    def close(self) -> None:
        """Let Python collect by itself again."""
        gc.enable()
