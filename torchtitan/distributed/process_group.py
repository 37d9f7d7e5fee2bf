"""Start and end of communication between ranks, and what is known when a rank hangs."""

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _dump_fr_trace  # type: ignore[attr-defined]

from torchtitan.config.errors import ConfigError
from torchtitan.config.job import Comm

TRACES = "comm_traces"  # below the dump folder
LOST = ("timed out", "connection closed", "connection reset", "connection refused", "broken pipe")


def world_size() -> int:
    """Ranks of this run, before there is a process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def open_process_group(comm: Comm, dump_folder: Path) -> torch.device:
    """Join the other ranks and return this rank's device: nccl on GPU, gloo on CPU and for host integers.

    A single process makes a group of its own, so that there is one code path. Where the program around us has
    joined already, its group is taken. Raises ConfigError where the others do not come.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    if comm.trace_buf_size > 0:
        _enable_flight_recorder(comm.trace_buf_size, dump_folder / TRACES)
    # Under a launcher the rendezvous comes from the environment. Alone there is nobody to meet, hence no port
    # to find.
    alone: dict[str, Any] = (
        {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    )
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=comm.init_timeout_seconds), **alone)
    except dist.DistError as error:
        raise ConfigError(_nobody_met(str(error).splitlines()[0], comm)) from error
    return device


def _nobody_met(why: str, comm: Comm) -> str:
    place = f"MASTER_ADDR = {os.environ.get('MASTER_ADDR')}, MASTER_PORT = {os.environ.get('MASTER_PORT')}"
    within = f"within {comm.init_timeout_seconds} s (comm.init_timeout_seconds)"
    return (
        f"{place}: the {world_size()} ranks of the run did not meet there {within}: {why.rstrip('.')}; "
        "start the same command on every machine, of which that address has NODE_RANK 0"
    )


def _enable_flight_recorder(entries: int, folder: Path) -> None:
    """Keep the last collectives in memory.

    On a timeout nccl writes them to a file of each rank; `torchfrtrace` reads those.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(entries))
    if torch.cuda.is_available():
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "rank_"))


def write_flight_record(comm: Comm, dump_folder: Path) -> None:
    """Write the collectives of this rank so far, as nccl does on a timeout; gloo leaves it to us."""
    if comm.trace_buf_size > 0 and dist.get_backend() == "gloo":
        folder = dump_folder / TRACES
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank_{dist.get_rank()}").write_bytes(_dump_fr_trace())


def set_timeout(seconds: int) -> None:
    """For every group that exists.

    Called after the first step: from then on nothing compiles or waits for data for long.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    groups = list(dist.distributed_c10d._world.pg_map)
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def note_step(step: int) -> None:
    """Note the step this rank is in, for `stragglers` of other ranks."""
    dist.distributed_c10d._get_default_store().set(f"step/{dist.get_rank()}", str(step))


def stragglers() -> str:
    """Which ranks are behind the others, from what they noted last; for the message of a rank that failed."""
    steps = _noted_steps()
    behind = [f"rank {rank} in step {step}" for rank, step in enumerate(steps) if step < max(steps)]
    return f"behind the others: {', '.join(behind)}" if behind else f"all ranks had begun step {max(steps)}"


def who_is_stuck(patience_s: float = 5.0) -> str:
    """For the message of a rank that lost the others.

    Ranks that only waited give up at about the same time and say so here; one that hangs, in its loader or
    on its device, or was killed, says nothing.
    """
    store, ranks = dist.distributed_c10d._get_default_store(), range(dist.get_world_size())
    note_failure("waited")
    end = time.monotonic() + patience_s
    while (
        silent := [rank for rank in ranks if not store.check([f"gave_up/{rank}"])]
    ) and time.monotonic() < end:
        time.sleep(0.1)
    steps = _noted_steps()
    own = [rank for rank in ranks if rank not in silent and store.get(f"gave_up/{rank}") == b"failed"]
    found = [f"rank {rank} failed by itself in step {steps[rank]}" for rank in own]
    found += [f"rank {rank} does not answer since it began step {steps[rank]}" for rank in silent]
    return ", ".join(found) or stragglers()


def who_is_to_blame(error: Exception) -> str:
    """For the message of a rank that failed: itself, or the others that it lost."""
    if lost_others(error):
        return who_is_stuck()
    note_failure("failed")
    return stragglers()


def note_failure(kind: str) -> None:
    """Note for `who_is_stuck` of other ranks: this rank "waited" in vain, or "failed" by itself."""
    dist.distributed_c10d._get_default_store().set(f"gave_up/{dist.get_rank()}", kind)


def lost_others(error: BaseException | None) -> bool:
    """Whether it came from a collective that timed out, or whose other ranks have ended. gloo raises a plain
    RuntimeError, and closes the connections of a group where one rank's time is out; a pipeline's stage wraps
    what it gets.
    """
    while error is not None:
        if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in LOST):
            return True
        error = error.__cause__
    return False


def _noted_steps() -> list[int]:
    store = dist.distributed_c10d._get_default_store()
    keys = [f"step/{rank}" for rank in range(dist.get_world_size())]
    return [int(store.get(key)) if store.check([key]) else 0 for key in keys]


def close_process_group() -> None:
    """Leave the process group; nothing where none was opened."""
    if dist.is_initialized():
        dist.destroy_process_group()
