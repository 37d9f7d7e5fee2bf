"""Profiler traces and CUDA memory snapshots, every `profile_freq` steps, one file a rank."""

import os
import pickle
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from torchtitan.config.job import Profiling
from torchtitan.tools.logging import logger

WARMUP_STEPS = 3  # recorded and thrown away: the profiler's own start would show
SNAPSHOT_ENTRIES = 100_000


class Profiler:
    """Traces and memory snapshots of this rank, as [profiling] asks for them; nothing where it does not."""

    def __init__(self, options: Profiling, dump_folder: str, rank: int, first_step: int):
        self.options, self.rank, self.step = options, rank, first_step
        self.traces = Path(dump_folder) / options.save_traces_folder
        self.snapshots = Path(dump_folder) / options.save_memory_snapshot_folder
        self.profile = self._start_profile() if options.enable_profiling else None
        if options.enable_memory_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)

    def _start_profile(self) -> profile:
        freq = self.options.profile_freq
        warmup = min(WARMUP_STEPS, freq - 1)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        phases = schedule(wait=freq - warmup - 1, warmup=warmup, active=1)
        started = profile(
            activities=activities, schedule=phases, on_trace_ready=self._write_trace, record_shapes=True
        )
        started.start()
        return started

    def _write_trace(self, finished: profile) -> None:
        folder = self.traces / f"step-{self.step}"
        folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(folder / f"rank{self.rank}_trace.json"))
        logger.info(f"profiler trace of step {self.step}: {folder}")

    def after_step(self, step: int) -> None:
        """Moves the profiler on, and writes a memory snapshot where one is due."""
        self.step = step
        if self.profile is not None:
            self.profile.step()
        if self.options.enable_memory_snapshot and step % self.options.profile_freq == 0:
            folder = self.snapshots / f"step-{step}"
            os.makedirs(folder, exist_ok=True)
            with open(folder / f"rank{self.rank}_memory_snapshot.pickle", "wb") as file:
                pickle.dump(torch.cuda.memory._snapshot(), file)

    def close(self) -> None:
        """Ends the profiler; a trace that is under way is written."""
        if self.profile is not None:
            self.profile.stop()
