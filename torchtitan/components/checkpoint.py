"""Checkpoints, written and read by torch.distributed.checkpoint.

How they lie on the disk: checkpoint_folder.py.
"""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan.components.checkpoint_folder import (
    DELETED,
    INCOMPLETE,
    RECORD,
    Damaged,
    complete_steps,
    find,
    find_initial,
    read_record,
)
from torchtitan.components.checkpoint_read import Failure, reading, reason, require_scale, stored_sizes
from torchtitan.components.train_state import TrainState
from torchtitan.config.check import NOT_LOADED
from torchtitan.config.errors import CheckpointError, ConfigError
from torchtitan.config.job import Checkpoint
from torchtitan.distributed.collectives import from_first_rank
from torchtitan.tools.disk import free
from torchtitan.tools.logging import logger


class Checkpointer:
    """Writes and reads the checkpoints of a run; every method is called by all ranks alike."""

    def __init__(self, options: Checkpoint, folder: Path, state: TrainState):
        self.options, self.folder, self.state = options, folder, state
        self.writes = dist.get_rank() == 0  # names, records and deletions; tensors are written by all ranks
        self.in_background = options.async_mode == "async"
        # Training and a checkpoint that is being written must not share a group: their collectives would mix.
        # Any: what `new_group` is said to return differs between versions of torch.
        self.group: Any = dist.new_group(backend="gloo") if self.in_background else None
        self.pending: tuple[int, Future] | None = None  # the step that is being written
        self.saved_step = -1
        if self.writes and options.enable:
            for leftover in [*folder.glob(f"step-*{INCOMPLETE}"), *folder.glob(f"step-*{DELETED}")]:
                shutil.rmtree(leftover)

    def save(self, last: bool = False) -> None:
        """Checkpoint the present step. Unless async, it is complete on return; the `last` one always is.

        Raises CheckpointError on every rank where it cannot be written; those that are complete stay.
        """
        self.wait()
        if not self.options.enable or self.state.step in (0, self.saved_step):
            return
        step = self.saved_step = self.state.step
        model_only = last and self.options.last_save_model_only
        tensors, record = self.state.tensors(model_only), self.state.record(model_only)
        path = self.folder / f"step-{step}{INCOMPLETE}"
        self._once(partial(_prepare, path, record), step)
        writer = dcp.FileSystemWriter(str(path))
        if self.in_background and not last:
            written = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
            complete = partial(self._complete, path, step) if self.writes else lambda: None
            self.pending = step, _then(written, complete)
            return
        try:
            dcp.save(tensors, storage_writer=writer)
        except Failure as error:
            self._once(partial(_raise, error), step)
        self._once(partial(self._complete, path, step), step)

    def _once(self, what: Callable[[], None], step: int) -> None:
        """`what` on rank 0, while the others wait. Raises CheckpointError on all where it fails."""

        def attempt() -> None:
            try:
                what()
            except Failure as error:
                raise self._unwritten(step, error) from None

        from_first_rank(attempt)

    def _unwritten(self, step: int, error: OSError | CheckpointException) -> CheckpointError:
        """The error to raise.

        What was written of this checkpoint is deleted, so that its space is there again.
        """
        room = free(self.folder)
        shutil.rmtree(self.folder / f"step-{step}{INCOMPLETE}", ignore_errors=True)
        complete = complete_steps(self.folder)
        again = f"the same command goes on from step {complete[-1]}" if complete else ""
        go_on = again or "start again: none is complete"
        return CheckpointError(
            f"checkpoint of step {step} was not written to {self.folder} ({reason(error)}; {room} free): "
            f"make room, and {go_on}"
        )

    def _complete(self, path: Path, step: int) -> None:
        """For rank 0, whose save returns after all ranks have written. Giving the name is the last step."""
        named = self.folder / f"step-{step}"
        _delete(named)
        path.rename(named)
        logger.info(f"checkpoint of step {step} is complete: {named}")
        keep = self.options.keep_latest_k
        for old in complete_steps(self.folder)[:-keep] if keep > 0 else []:
            _delete(self.folder / f"step-{old}")

    def wait(self) -> None:
        """Wait until the checkpoint in the background, if any, is complete.

        Raises CheckpointError as `save` does.
        """
        if self.pending is not None:
            (step, written), self.pending = self.pending, None
            self._once(written.result, step)
            written.result()

    def load(self) -> None:
        """Go on from the run's own checkpoint, else start from `initial_load_path`, else from nothing."""
        own = find(self.options, self.folder)
        initial = None if own else find_initial(self.options)
        if own and read_record(own)["model_only"]:
            raise ConfigError(
                f"{own} holds the weights alone (checkpoint.last_save_model_only), so this run cannot go on "
                f"from it: give another job.dump_folder with checkpoint.initial_load_path = {own}, or "
                "checkpoint.load_step"
            )
        if own:
            self._read(own, set(self.options.exclude_from_loading))
            self.saved_step = self.state.step
        elif initial:
            try:
                self._read_initial(initial)
            except Damaged as error:
                raise Damaged(error.path, error.why, own=False) from None

    def _read_initial(self, path: Path) -> None:
        model_only = self.options.initial_load_model_only or read_record(path)["model_only"]
        self._read(path, set(NOT_LOADED if model_only else self.options.exclude_from_loading), own=False)

    def _read(self, path: Path, without: set[str], own: bool = True) -> None:
        record, sizes = read_record(path), stored_sizes(path)
        filled = self.state.to_fill(sizes, without, own)
        require_scale(path, self.state.adapter_scale)
        with reading(path):
            dcp.load(filled, checkpoint_id=str(path))
        self.state.restore(filled, record, without)
        logger.info(
            f"loaded {path}{', without ' + ', '.join(sorted(without)) if without else ''}; at step "
            f"{self.state.step}"
        )


def _raise(error: BaseException) -> None:
    raise error


def _prepare(path: Path, record: dict[str, Any]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    (path / RECORD).write_text(json.dumps(record, indent=1))


def _then(first: Any, what: Callable[[], None]) -> Future:
    """A future of `what`, which runs after `first`, in its thread."""
    both: Future = Future()

    def go_on(done: Future) -> None:
        try:
            done.result()
            what()
            both.set_result(None)
        except BaseException as error:
            both.set_exception(error)

    first.add_done_callback(go_on)
    return both


def _delete(path: Path) -> None:
    """Out of sight at once, then from the disk: half a checkpoint never bears a complete one's name."""
    if path.exists():
        away = path.with_name(path.name + DELETED)
        shutil.rmtree(away, ignore_errors=True)
        path.rename(away)
        shutil.rmtree(away)
