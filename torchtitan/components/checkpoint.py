"""Checkpoints are written and read by torch.distributed.checkpoint. How they lie on the disk: checkpoint_folder.py."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchtitan.components.checkpoint_folder import (
    DELETED,
    INCOMPLETE,
    RECORD,
    complete_steps,
    find,
    find_initial,
    read_record,
)
from torchtitan.components.train_state import TrainState
from torchtitan.config.errors import ConfigError
from torchtitan.config.job import Checkpoint
from torchtitan.tools.logging import logger


def stored_sizes(path: Path) -> dict[str, tuple[int, ...]]:
    metadata = dcp.FileSystemReader(str(path)).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}


class Checkpointer:
    def __init__(self, options: Checkpoint, folder: Path, state: TrainState):
        self.options, self.folder, self.state = options, folder, state
        self.writes = dist.get_rank() == 0  # names, records and deletions; tensors are written by all ranks
        self.in_background = options.async_mode == "async"
        # Training and a checkpoint that is being written must not share a group: their collectives would mix.
        self.group = dist.new_group(backend="gloo") if self.in_background else None
        self.pending: Future | None = None
        self.saved_step = -1
        if self.writes and options.enable:
            for leftover in [*folder.glob(f"step-*{INCOMPLETE}"), *folder.glob(f"step-*{DELETED}")]:
                shutil.rmtree(leftover)

    def save(self, last: bool = False) -> None:
        """Checkpoint the present step. Unless async, it is complete on return; the `last` one always is."""
        self.wait()
        if not self.options.enable or self.state.step in (0, self.saved_step):
            return
        step = self.saved_step = self.state.step
        model_only = last and self.options.last_save_model_only
        tensors, record = self.state.tensors(model_only), self.state.record(model_only)
        path = self.folder / f"step-{step}{INCOMPLETE}"
        self._prepare(path, record)
        writer = dcp.FileSystemWriter(str(path))
        if self.in_background and not last:
            written = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
            self.pending = _then(written, partial(self._complete, path, step))
            return
        dcp.save(tensors, storage_writer=writer)
        self._complete(path, step)
        dist.barrier()

    def _prepare(self, path: Path, record: dict[str, Any]) -> None:
        if self.writes:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            (path / RECORD).write_text(json.dumps(record, indent=1))
        dist.barrier()

    def _complete(self, path: Path, step: int) -> None:
        """Rank 0's save returns after all ranks have written; giving the name is the last thing that happens."""
        if not self.writes:
            return
        named = self.folder / f"step-{step}"
        _delete(named)
        path.rename(named)
        logger.info(f"checkpoint of step {step} is complete: {named}")
        keep = self.options.keep_latest_k
        for old in complete_steps(self.folder)[:-keep] if keep > 0 else []:
            _delete(self.folder / f"step-{old}")

    def wait(self) -> None:
        """Until the checkpoint in the background, if any, is complete. Raises what went wrong in it."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def load(self) -> None:
        """Go on from the run's own checkpoint, else start from `initial_load_path`, else from nothing."""
        own = find(self.options, self.folder)
        initial = None if own else find_initial(self.options)
        if own and read_record(own)["model_only"]:
            raise ConfigError(
                f"{own} holds the weights alone (checkpoint.last_save_model_only), so this run cannot go on from it: "
                f"give another job.dump_folder with checkpoint.initial_load_path = {own}, or checkpoint.load_step"
            )
        if own:
            self._read(own, set(self.options.exclude_from_loading))
            self.saved_step = self.state.step
        elif initial:
            model_only = self.options.initial_load_model_only or read_record(initial)["model_only"]
            everything = {"optimizer", "lr_scheduler", "data", "train_state"}
            self._read(initial, everything if model_only else set(self.options.exclude_from_loading))

    def _read(self, path: Path, without: set[str]) -> None:
        filled = self.state.to_fill(stored_sizes(path), without)
        dcp.load(filled, checkpoint_id=str(path))
        self.state.restore(filled, read_record(path), without)
        logger.info(f"loaded {path}{', without ' + ', '.join(sorted(without)) if without else ''}; at step {self.state.step}")


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
    """Out of sight at once, then from the disk, so that half a checkpoint never bears a complete one's name."""
    if path.exists():
        away = path.with_name(path.name + DELETED)
        shutil.rmtree(away, ignore_errors=True)
        path.rename(away)
        shutil.rmtree(away)
