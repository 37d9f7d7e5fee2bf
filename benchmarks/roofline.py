"""What would a training step take if every kernel ran at the limit of the GPU, and what did it take?

    python -m benchmarks.roofline [--flavor so400m-llama3.2-3B] [--slots 2] [--accumulation 2] [--gpu H200]
                                  [--seen LOG] [--out FOLDER] [--section.field VALUE ...]

Needs no GPU: the model runs forward and backward once on the meta device, where each operator's FLOPs and
bytes are counted, on slots of the very documents of benchmarks.train_step. A product or an attention reads
and writes its operands once; what lies between two of them counts as one kernel, which reads what was there
before and writes what is read later: the least that a compiler can reach. The optimizer reads and writes
each weight, gradient and moment once. Each kernel is expected to take as long as its FLOPs or its bytes,
whichever is more.

`--seen`: what `benchmarks.train_step --kernels` printed, for the same job: its times are a column more.
Written: a table, and FOLDER/roofline.png.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from benchmarks.train_job import add_job_arguments, batches_of, job_of, write_shards
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.costs.flops import Work, flops_of_work, image_pairs
from experiments.vlm.costs.rank_share import build_on_meta, meta_batch
from experiments.vlm.model.vlm import VLM
from experiments.vlm.model_config import plan_of
from experiments.vlm.spec import SPEC
from experiments.vlm.weights import embedding_rows
from torchtitan.components.flops import causal_pairs
from torchtitan.components.optimizer import moments
from torchtitan.config.layout import Degrees
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.distributed.footprint import fuse_norms
from torchtitan.distributed.fsdp import Sharding
from torchtitan.distributed.mesh import imagine_mesh
from torchtitan.tools.hardware import peak_flops_of

# Bytes a second of the memory, from the makers' data sheets.
BANDWIDTH = {"A100": 2.04e12, "H100": 3.35e12, "H200": 4.8e12, "B200": 8e12}
STEPS_OF_DATA = 4
PRODUCTS, ATTENTION, ELEMENTWISE = "matrix products", "attention", "fused elementwise"
OPTIMIZER, FSDP = "optimizer", "copies of FSDP"
SEEN_AS = {"copies": ELEMENTWISE, "other": ELEMENTWISE}  # kinds of benchmarks/kernels.py that are no row here
KINDS = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), PRODUCTS),
    **dict.fromkeys(("segment_attention", "segment_attention_backward"), ATTENTION),
}


Place = tuple[int, int]


@dataclass
class Kernel:
    """One of a kind: what it computes, and the places that it reads and writes: storages and offsets."""

    kind: str
    flops: float = 0
    reads: dict[Place, int] = field(default_factory=dict)  # -> bytes
    writes: dict[Place, int] = field(default_factory=dict)


class Recorder(TorchDispatchMode):
    """The kernels of what runs on the meta device, each chain of operators between two products as one."""

    def __init__(self, attention: dict[tuple[int, ...], float]):
        """`attention`: FLOPs of a layer's forward by (rows, heads, width of a head) of its queries; which
        pairs may attend is not seen on the meta device.
        """
        super().__init__()
        self.attention = attention
        self.kernels: list[Kernel] = []
        self._alive: list[Tensor] = []  # on the meta device it costs nothing, and no number comes back

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = operator(*args, **(kwargs or {}))
        if not _only_views(operator):
            name = operator.name().split("::")[1].split(".")[0]
            kind = KINDS.get(name, ELEMENTWISE)
            flops = 0.0
            if kind == PRODUCTS:
                left, right = [each for each in args if isinstance(each, Tensor)][-2:]
                flops = 2.0 * left.numel() * right.shape[-1]
            elif kind == ATTENTION:
                back = name.endswith("backward")
                # The kernels compute the scores again: five products where forward has two.
                flops = self.attention[tuple(args[back].shape[1:])] * (2.5 if back else 1)
            self.note(kind, (args, kwargs), out, flops)
        return out

    def note(self, kind: str, inputs: Any, out: Any, flops: float = 0) -> None:
        """One operator; what is not a product goes on with the kernel before it, if that is none either."""
        if kind != ELEMENTWISE or not self.kernels or self.kernels[-1].kind != ELEMENTWISE:
            self.kernels.append(Kernel(kind))
        kernel = self.kernels[-1]
        kernel.flops += flops
        made = _storages(kernel.writes)
        for place, size in self._sizes(inputs):
            if place[0] not in made:
                kernel.reads[place] = max(size, kernel.reads.get(place, 0))
        for place, size in self._sizes(out):
            kernel.writes[place] = max(size, kernel.writes.get(place, 0))

    def _sizes(self, tree: Any) -> Iterable[tuple[Place, int]]:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self._alive.append(leaf)
                # What is broadcast is read once.
                storage = leaf.untyped_storage()
                yield (storage._cdata, leaf.storage_offset()), min(leaf.nbytes, storage.nbytes())

    def fuse(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A pass over the logits (layers/cross_entropy.py)."""

        def kernel(*args: Tensor) -> Tensor:
            with _disable_current_modes():
                result = function(*args)
            self.note(ELEMENTWISE, args, result)
            return result

        return kernel

    def found(self) -> list[Kernel]:
        """Without what a chain writes and nobody else reads: it stays in registers."""
        later: set[int] = set()
        for kernel in reversed(self.kernels):
            if kernel.kind == ELEMENTWISE:
                kernel.writes = {place: size for place, size in kernel.writes.items() if place[0] in later}
            later |= _storages(kernel.reads)
        return [kernel for kernel in self.kernels if kernel.reads or kernel.writes]


def _storages(places: Iterable[Place]) -> set[int]:
    return {storage for storage, _ in places}


def _only_views(operator: Any) -> bool:
    """Whether all results are other views of what was given, or memory that is not yet written."""
    results = operator._schema.returns
    aliases = [result.alias_info for result in results]
    views = bool(results) and all(alias is not None and not alias.is_write for alias in aliases)
    return views or operator.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty)


@dataclass(frozen=True)
class Row:
    """All kernels of a kind in a step."""

    kind: str
    kernels: int
    flops: float
    bytes: float
    seconds: float  # at the least


def rows_of(kernels: Sequence[Kernel], peak: float, bandwidth: float, times: int) -> list[Row]:
    """A row for each kind, in the order of first kernels; every kernel runs `times` times in a step."""
    rows = []
    for kind in dict.fromkeys(kernel.kind for kernel in kernels):
        alike = [kernel for kernel in kernels if kernel.kind == kind]
        moved = [sum(kernel.reads.values()) + sum(kernel.writes.values()) for kernel in alike]
        least = sum(
            max(kernel.flops / peak, size / bandwidth) for kernel, size in zip(alike, moved, strict=True)
        )
        flops = sum(kernel.flops for kernel in alike)
        rows.append(Row(kind, times * len(alike), times * flops, times * sum(moved), times * least))
    return rows


def kernels_of_forward(job: VLMJobConfig, model: VLM, work: Work) -> list[Kernel]:
    """Kernels of one forward and backward on one GPU; `model`: whole, on the meta device; `work`: of a
    forward.
    """
    config, length = model.config, job.training.seq_len
    assert model.encoder is not None and model.decoder.output is not None
    apply_activation_checkpoint(model.encoder.layers, job.activation_checkpoint.encoder)
    apply_activation_checkpoint(model.decoder.layers, job.activation_checkpoint.decoder)
    fuse_norms(model)
    encoder, decoder = config.encoder, config.decoder
    of_encoder = job.data.patches_per_row, encoder.heads, encoder.dim // encoder.heads
    of_decoder = length, decoder.heads, decoder.head_dim
    recorder = Recorder(
        {
            of_encoder: 4 * encoder.dim * work.image_pairs,
            of_decoder: 4 * decoder.heads * decoder.head_dim * work.causal_pairs,
        }
    )
    model.decoder.output.fuse = recorder.fuse
    one = imagine_mesh(Degrees(1, 1, 1, 1, 1))
    batch = meta_batch(job, one, job.training.local_batch_size, plan_of(config, job))
    with recorder, torch.enable_grad():
        model(**batch).sum().backward()
    return recorder.found()


def rows_of_weights(job: VLMJobConfig, model: VLM, bandwidth: float) -> list[Row]:
    """What a step on one GPU adds to its forwards: FSDP's casts, and AdamW (of Muon, its moments alone)."""
    forwards = job.training.global_batch_size // job.training.local_batch_size
    width = Sharding.of(job).param_dtype.itemsize
    numbers = sum(parameter.numel() for parameter in model.parameters())
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    updated = sum(p.numel() for _, p in trained)
    casts = numbers * (4 + width) * (1 + Sharding.of(job).reshard_after_forward) + updated * (width + 8)
    update = 4 * (3 * updated + 2 * moments(trained, job.optimizer, VLM.ADAMW_ONLY))
    sizes = {FSDP: casts * forwards, OPTIMIZER: update}
    return [Row(kind, 0, 0.0, size, size / bandwidth) for kind, size in sizes.items()]


def work_of_data(job: VLMJobConfig, tokenizer: Any) -> Work:
    """The work of a forward, as a mean over some steps of the job's own data."""
    works = []
    for batch in itertools.chain.from_iterable(batches_of(job, tokenizer, STEPS_OF_DATA)):
        tensors, counts = batch.tensors, batch.counts
        pairs = causal_pairs(tensors["positions"], tensors["document_ids"])
        works.append((counts["patches"], counts["tokens"], image_pairs(tensors["grid_thw"]), pairs))
    return Work(*(sum(column) // len(works) for column in zip(*works, strict=True)))


def seen_seconds(log: Path) -> dict[str, float]:
    """Seconds of a step, by kind, in the last of the ways in a log of benchmarks.train_step."""
    facts = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    seconds: dict[str, float] = {}
    for kind, (_, each) in facts["rows"][-1]["kernels"].items():
        name = SEEN_AS.get(kind, kind)
        seconds[name] = seconds.get(name, 0.0) + each
    return seconds


def table(rows: Sequence[Row], seen: dict[str, float]) -> str:
    """In Markdown."""
    lines = [
        "| kind | kernels | TFLOP | GB | FLOP a byte | expected, ms | seen, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        took = f"{1000 * seen[row.kind]:.1f}" if row.kind in seen else "not measured"
        lines.append(
            f"| {row.kind} | {row.kernels or ''} | {row.flops / 1e12:.2f} | {row.bytes / 1e9:.1f} | "
            f"{row.flops / row.bytes:.1f} | {1000 * row.seconds:.1f} | {took} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], seen: dict[str, float], peak: float, bandwidth: float, path: Path) -> None:
    """The roof with each kind that has products under it, and the milliseconds of all kinds."""
    figure, (roof, bars) = plt.subplots(1, 2, figsize=(12, 4.5))
    intensities = [1, peak / bandwidth, 8192]
    roof.loglog(intensities, [min(peak, each * bandwidth) / 1e12 for each in intensities], color="black")
    for row, height in zip([row for row in rows if row.flops], (-16, -30), strict=False):
        x = row.flops / row.bytes
        for seconds, color in ((row.seconds, "tab:blue"), (seen.get(row.kind), "tab:orange")):
            if seconds:
                roof.plot(x, row.flops / seconds / 1e12, "o", color=color)
        roof.annotate(
            row.kind,
            (x, row.flops / row.seconds / 1e12),
            (0, height),
            textcoords="offset points",
            ha="center",
        )
    roof.set(xlabel="FLOP a byte", ylabel="TFLOP/s", title="The roof, and what is under it")
    bar = 0.4 if seen else 0.8
    for times, label, shift in (
        ({row.kind: row.seconds for row in rows}, "expected", 0),
        (seen, "seen", 1),
    ):
        if times:
            taken = [1000 * times.get(row.kind, 0.0) for row in rows]
            bars.barh([place + bar * shift for place in range(len(rows))], taken, bar, label=label)
    bars.set_yticks(
        [place + bar * 0.5 * bool(seen) for place in range(len(rows))], [row.kind for row in rows]
    )
    bars.invert_yaxis()
    bars.set(xlabel="ms a step", title="A step, by kind of kernel")
    bars.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_job_arguments(parser, "so400m-llama3.2-3B", accumulation=2)
    parser.add_argument("--gpu", choices=list(BANDWIDTH), default="H200")
    parser.add_argument("--seen", type=Path, help="output of benchmarks.train_step --kernels")
    parser.add_argument("--out", type=Path, default=Path("outputs/roofline"))
    options, given = parser.parse_known_args()
    peak, bandwidth = peak_flops_of(options.gpu), BANDWIDTH[options.gpu]
    assert peak is not None
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), options.photos)
        job = job_of(options, "compiled", given, Path(folder))
        tokenizer = SPEC.load_tokenizer(job)
        work = work_of_data(job, tokenizer)
    vocab, dtype = embedding_rows.rows_of(job, tokenizer), Sharding.of(job).param_dtype
    model = build_on_meta(job, SPEC.model_config(job), vocab).to(dtype)
    useful = flops_of_work(model)(work) * options.accumulation
    rows = rows_of(kernels_of_forward(job, model, work), peak, bandwidth, options.accumulation)
    rows += rows_of_weights(job, model, bandwidth)
    seen = seen_seconds(options.seen) if options.seen else {}
    least = sum(row.seconds for row in rows)
    asked = f"{options.slots} slots a forward, {options.accumulation} forwards a step"
    print(f"{options.flavor}, {asked}, {options.gpu}")
    print(f"{peak / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s; of a forward: {work}")
    print(table(rows, seen))
    print(
        f"all: {1000 * least:.0f} ms at the least; useful work is {useful / 1e12:.1f} TFLOP, so MFU at most "
        f"{100 * useful / peak / least:.1f} %"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    draw(rows, seen, peak, bandwidth, options.out / "roofline.png")


if __name__ == "__main__":
    main()
