"""Say what a job needs on each rank, without a GPU: peak memory, FLOPs, bytes sent, and which layouts fit.

    torchtitan-vlm estimate --job.config_file vlm_so400m_llama3.1_8b --world_size 512

Memory is that of tensors in eager execution; leave 1 to 2 GiB for CUDA and nccl, and some for fragmentation.
torch.compile keeps less. FLOPs are those of full slots, with one document a slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.commands.job_options import parse_command
from experiments.vlm.check import check_estimated
from experiments.vlm.costs.estimate import Estimate, estimate, estimates
from experiments.vlm.weights.embedding_rows import planned_rows
from torchtitan.config.check import check_options
from torchtitan.config.layout import Degrees, degrees
from torchtitan.tools.hardware import GIB


@dataclass
class Options:
    """How many ranks of what memory, and which layouts of them are tried."""

    world_size: int = 1  # ranks; thousands cost nothing
    memory_gib: float = 80.0  # of a GPU; layouts that need more are not listed
    max_tp: int = 8  # tensor parallel inside a machine
    max_cp: int = 16  # context parallel
    max_pp: int = 16  # pipeline parallel
    max_replicate: int = 1  # HSDP: copies
    rows: int = 20  # layouts to list, those that send least for a slot first; 0: none


LIMITS = {
    "world_size": ">= 1",
    "memory_gib": "> 0",
    "max_tp": ">= 1",
    "max_cp": ">= 1",
    "max_pp": ">= 1",
    "max_replicate": ">= 1",
    "rows": ">= 0",
}


def _print_estimate(e: Estimate) -> None:
    m = e.memory
    print(
        f"\n{e.sizes.name}: {e.batch.local} slots a forward, {e.batch.global_} a step, in "
        f"{e.batch.accumulation} forwards"
    )
    for note in e.notes:
        print(f"  changed to fit: {note}")
    where = f" of pipeline rank {e.rank}" if e.sizes.pp > 1 else ""
    print(f"  peak memory a rank {m.total / GIB:8.2f} GiB   in {m.where}{where}")
    for part in ("state", "gradients", "gathered", "kept", "working"):
        print(f"    {part:16s} {getattr(m, part) / GIB:8.2f} GiB")
    print(f"  FLOPs of a step    {e.flops:.3e} in all, {e.flops / e.sizes.ranks:.3e} a rank")
    print("  bytes that a rank sends in a step")
    for collective, amount in e.sent.items():
        print(f"    {collective:34s} {amount / 1e9:10.3f} GB")


def _print_layouts(found: list[Estimate], options: Options) -> None:
    fitting = sorted(
        (e for e in found if e.memory.total <= options.memory_gib * GIB), key=lambda e: e.sent_per_slot
    )
    print(f"\n{len(fitting)} of {len(found)} layouts fit {options.memory_gib:g} GiB")
    print(f"  {'layout':28s} {'peak GiB':>9s} {'GB/slot':>10s} {'slots':>6s} {'a step':>8s}")
    for e in fitting[: options.rows]:
        need = f"{e.memory.total / GIB:9.2f} {e.sent_per_slot / 1e9:10.1f}"
        print(
            f"  {e.sizes.name:28s} {need} {e.batch.local:6d} {e.batch.global_:8d}{'  *' if e.notes else ''}"
        )
    if any(e.notes for e in fitting[: options.rows]):
        print("  * slots or global batch changed to fit the layout")
    if not fitting and found:
        least = min(found, key=lambda e: e.memory.total)
        print(f"  least: {least.sizes.name} with {least.memory.total / GIB:.2f} GiB")


def main(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    options, job = parse_command(argv, Options, __doc__)
    check_options(options, LIMITS)
    check_estimated(job)
    vocab_size = planned_rows(job)
    _print_estimate(estimate(job, degrees(job.parallelism, options.world_size), vocab_size))
    if options.rows:
        most = Degrees(
            options.max_replicate, options.world_size, options.max_cp, options.max_tp, options.max_pp
        )
        _print_layouts(list(estimates(job, options.world_size, vocab_size, most)), options)
    return 0
