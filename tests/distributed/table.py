"""The layouts that are compared with one process, and the table of how far they are from it.

`python -m tests.distributed` prints it.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from tests.distributed.layouts import Difference, Layout, Measured, compare, train
from tests.distributed.pool import Pool, RankFailed
from tests.reference.small_run import SLOTS
from torchtitan.config.job import ParameterGroup

# Short names of options, for a list that can be read.
KEYS = {
    "replicate": "parallelism.data_parallel_replicate_degree",
    "tp": "parallelism.tensor_parallel_degree",
    "cp": "parallelism.context_parallel_degree",
    "pp": "parallelism.pipeline_parallel_degree",
    "schedule": "parallelism.pipeline_parallel_schedule",
    "microbatch": "parallelism.pipeline_parallel_microbatch_size",
    "split": "parallelism.pipeline_parallel_split_points",
    "encoder_stage": "parallelism.pipeline_parallel_encoder_stage",
    "method": "parallelism.context_parallel_method",
    "balance": "parallelism.context_parallel_load_balance",
    "sharing": "parallelism.encoder_sharing",
    "heads": "parallelism.encoder_tensor_parallel",
    "reshard": "parallelism.fsdp_reshard_after_forward",
    "slots": "training.local_batch_size",
    "global_slots": "training.global_batch_size",
    "ac": "activation_checkpoint.mode",
    "encoder_ac": "activation_checkpoint.encoder_mode",
    "every": "activation_checkpoint.selective_ac_option",
    "compile": "compile.enable",
    "offload": "training.enable_cpu_offload",
}
# These change what is trained, so that one process has to train it too.
TASK = {
    "model": "model.flavor",
    "freeze": "training.freeze",
    "rows": "data.patch_rows",
    "optimizer": "optimizer.name",
    "groups": "optimizer.groups",
    "tokens": "training.trainable_tokens",
    "lora": "lora.rank",
    "adapted": "lora.patterns",
    "fp8": "float8.enable",
    "emulate": "float8.emulate",
    "in_fp8": "float8.patterns",
}
BOUND = 1e-5  # float32 sums in another order; seen: below 4e-6
WEIGHT_BOUND = 1e-4  # after the last step: a thirtieth of what AdamW moves a weight in one; seen: below 2e-5


def layout(name: str, ranks: int, **options: Any) -> Layout:
    """By default as few slots a forward as a pipeline needs."""
    options.setdefault("slots", 4 if "pp" in options else 1)
    return Layout(name, ranks, {(KEYS | TASK)[key]: value for key, value in options.items()})


FREEZE = [r"encoder\.layers\.0", "bias", "norm", r"decoder\.layers\.[02]\.attention\.w[kv]", "tok_embeddings"]
GROUPS = [
    ParameterGroup("encoder", lr=1e-3, layer_decay=0.5),
    ParameterGroup(r"decoder\.layers\.[01]\.", weight_decay=0.5, schedule_factor=2.0),
    ParameterGroup("decoder", schedule_factor=0.5, layer_decay=0.9),
]
LORA = {"lora": 4, "adapted": [r"layers.*(w[qkvo123]|fc\d)$"]}
TABLES = ["embeddings", "output"]  # frozen, but for some rows
FRONT = ["tok_embeddings", r"decoder\.layers\.[012]\."]
ON_TWO = [
    layout("accumulation", 1, slots=2),
    layout("accumulation, muon", 1, slots=2, optimizer="Muon"),
    layout("fsdp2", 2),
    layout("fsdp2, accumulation of 2", 2, slots=2),
    layout("fsdp2, full checkpointing", 2, ac="full", encoder_ac="full"),
    layout("fsdp2, selective by operator", 2, ac="selective", encoder_ac="selective", reshard="always"),
    layout(
        "fsdp2, selective by layer", 2, ac="selective", encoder_ac="selective", every="2", reshard="never"
    ),
    layout("fsdp2, compile", 2, compile=True),
    layout("fsdp2, offload to the CPU", 2, offload=True),
    layout("fsdp2, tied, frozen encoder", 2, model="small-qwen2", freeze=["encoder"]),
    layout("fsdp2, frozen by pattern", 2, freeze=FREEZE),
    layout("fsdp2, lora", 2, **LORA),
    layout("tp2, lora", 2, tp=2, **LORA),
    layout("tp2, lora, encoder heads, muon", 2, tp=2, heads=True, optimizer="Muon", **LORA),
    layout("pp2, lora", 2, pp=2, freeze=["projector"], **LORA),
    layout("fsdp2, groups", 2, groups=GROUPS),
    layout("fsdp2, muon", 2, optimizer="Muon"),
    layout("fsdp2, muon, groups", 2, optimizer="Muon", groups=GROUPS),
    layout("replicate2", 2, replicate=2),
    layout("tp2", 2, tp=2),
    layout("tp2, tied, biases", 2, tp=2, model="small-qwen2"),
    layout("tp2, some rows", 2, tp=2, freeze=TABLES, tokens=["new"]),
    layout("tp2, frozen by pattern", 2, tp=2, freeze=FREEZE),
    layout("tp2, encoder heads", 2, tp=2, heads=True),
    layout("tp2, shared encoder", 2, tp=2, slots=2, sharing="on"),
    layout("cp2", 2, cp=2),
    layout("cp2, in order", 2, cp=2, balance=False),
    layout("cp2, ulysses", 2, cp=2, method="ulysses"),
    layout("cp2, shared encoder of 2 rows a slot", 2, cp=2, rows=2, sharing="on"),
    layout("pp2", 2, pp=2),
    layout("pp2, GPipe", 2, pp=2, schedule="GPipe", microbatch=2),
    layout("pp2, Interleaved1F1B", 2, pp=2, schedule="Interleaved1F1B"),
    layout("pp2, InterleavedZeroBubble", 2, pp=2, schedule="InterleavedZeroBubble"),
    layout("pp2, ZBVZeroBubble", 2, pp=2, schedule="ZBVZeroBubble"),
    layout("pp2, ZBVZeroBubble, tied", 2, pp=2, schedule="ZBVZeroBubble", model="small-qwen3-tied"),
    layout("pp2, tied", 2, pp=2, model="small-qwen3-tied"),
    layout("pp2, tied, frozen decoder", 2, pp=2, model="small-qwen3-tied", freeze=["decoder"]),
    layout("pp2, tied, some rows", 2, pp=2, freeze=TABLES[:1], tokens=["<|two|>"], model="small-qwen3-tied"),
    layout("pp2, frozen by pattern", 2, pp=2, freeze=FREEZE),
    layout("pp2, nothing trains in the first stage", 2, pp=2, freeze=["encoder", "projector", *FRONT]),
    layout(
        "pp2, ZBVZeroBubble, nothing trains in the first stages",
        2,
        pp=2,
        schedule="ZBVZeroBubble",
        freeze=["encoder", "projector", *FRONT],
    ),
    layout("pp2, encoder stage", 2, pp=2, encoder_stage=True),
    layout("pp2, split by hand", 2, pp=2, split=[3]),
    layout("pp2, resharding after forward", 2, pp=2, reshard="always"),
    layout("fsdp2, clip, full checkpointing", 2, model="small-clip", ac="full", encoder_ac="full"),
    layout("fsdp2, dinov3, muon, groups", 2, model="small-dinov3", optimizer="Muon", groups=GROUPS),
    layout("tp2, clip, shared encoder", 2, model="small-clip", tp=2, slots=2, sharing="on"),
    layout("tp2, aimv2, encoder heads", 2, model="small-aimv2", tp=2, heads=True),
    layout("tp2, dinov3, encoder heads", 2, model="small-dinov3", tp=2, heads=True),
    layout("cp2, dinov3", 2, model="small-dinov3", cp=2),
    layout("pp2, dinov3", 2, model="small-dinov3", pp=2),
    layout("tp2, dinov3, shared encoder", 2, model="small-dinov3", tp=2, slots=2, sharing="on"),
    layout("fsdp2, llava, projector alone", 2, model="small-llava", freeze=["encoder", "decoder"]),
    layout("tp2, llava, encoder heads", 2, model="small-llava", tp=2, heads=True),
    layout("tp2, llava, shared encoder", 2, model="small-llava", tp=2, slots=2, sharing="on"),
    layout("cp2, llava", 2, model="small-llava", cp=2),
    layout("pp2, llava, frozen encoder", 2, model="small-llava", pp=2, freeze=["encoder"]),
    layout("pp2, llava, encoder stage", 2, model="small-llava", pp=2, encoder_stage=True),
    layout(
        "fsdp2, llava-next, full checkpointing", 2, model="small-llava-next", ac="full", encoder_ac="full"
    ),
    layout("tp2, llava-next, encoder heads", 2, model="small-llava-next", tp=2, heads=True),
    layout("tp2, llava-next, shared encoder", 2, model="small-llava-next", tp=2, slots=2, sharing="on"),
    layout("cp2, llava-next, 2 rows a slot", 2, model="small-llava-next", cp=2, rows=2, sharing="on"),
    layout("pp2, llava-next", 2, model="small-llava-next", pp=2),
    layout("pp2, llava-next, encoder stage", 2, model="small-llava-next", pp=2, encoder_stage=True),
    layout("fsdp2, onevision", 2, model="small-onevision"),
    layout(
        "fsdp2, onevision, full checkpointing, muon",
        2,
        model="small-onevision",
        ac="full",
        encoder_ac="full",
        optimizer="Muon",
    ),
    layout("tp2, onevision, encoder heads", 2, model="small-onevision", tp=2, heads=True),
    layout("tp2, onevision, repeated encoder", 2, model="small-onevision", tp=2, sharing="off"),
    layout("tp2, onevision, shared encoder", 2, model="small-onevision", tp=2, slots=2, sharing="on"),
    layout("cp2, onevision", 2, model="small-onevision", cp=2),
    layout(
        "cp2, onevision, ulysses, 2 rows a slot",
        2,
        model="small-onevision",
        cp=2,
        method="ulysses",
        rows=2,
        sharing="on",
    ),
    layout("pp2, onevision", 2, model="small-onevision", pp=2),
    layout("pp2, onevision, encoder stage", 2, model="small-onevision", pp=2, encoder_stage=True),
]
ON_FOUR = [
    layout("replicate2.fsdp2", 4, replicate=2),
    layout("replicate2.fsdp2, llava", 4, model="small-llava", replicate=2),
    layout("replicate2.fsdp2, dinov3", 4, model="small-dinov3", replicate=2),
    layout("cp2.pp2, llava", 4, model="small-llava", cp=2, pp=2),
    layout("replicate2.fsdp2, llava-next", 4, model="small-llava-next", replicate=2),
    layout("cp2.pp2, onevision", 4, model="small-onevision", cp=2, pp=2),
    layout("replicate2.fsdp2, onevision", 4, model="small-onevision", replicate=2),
    layout(
        "tp2.cp2, onevision, compile",
        4,
        model="small-onevision",
        tp=2,
        cp=2,
        slots=4,
        sharing="on",
        compile=True,
    ),
    layout(
        "tp2.cp2, llava, shared encoder of 2 rows a slot",
        4,
        model="small-llava",
        tp=2,
        cp=2,
        slots=2,
        rows=2,
        sharing="on",
    ),
    layout("fsdp2.tp2", 4, tp=2),
    layout("fsdp2.tp2, lora, full checkpointing", 4, tp=2, ac="full", **LORA),
    layout("tp2.cp2, lora, compile", 4, tp=2, cp=2, compile=True, **LORA),
    layout("fsdp2.tp2, some rows", 4, tp=2, freeze=TABLES, tokens=["new"]),
    layout("tp2.pp2, groups, tied", 4, tp=2, pp=2, groups=GROUPS, model="small-qwen3-tied"),
    layout("fsdp2.tp2, muon", 4, tp=2, optimizer="Muon"),
    layout("fsdp2.cp2", 4, cp=2, slots=2, sharing="on"),
    layout("fsdp2.pp2", 4, pp=2),
    layout(
        "tp2.cp2, dinov3, encoder heads, compile",
        4,
        model="small-dinov3",
        tp=2,
        cp=2,
        heads=True,
        slots=2,
        compile=True,
    ),
    layout("tp2.cp2, shared encoder", 4, tp=2, cp=2, slots=4, sharing="on"),
    layout("tp2.cp2, repeated encoder", 4, tp=2, cp=2, sharing="off"),
    layout("tp2.cp2, encoder heads", 4, tp=2, cp=2, heads=True, slots=2),
    layout(
        "tp2.cp2, ulysses, selective", 4, tp=2, cp=2, method="ulysses", ac="selective", encoder_ac="selective"
    ),
    layout("tp2.pp2, frozen decoder", 4, tp=2, pp=2, freeze=["decoder"]),
    layout(
        "cp2.pp2, full checkpointing", 4, cp=2, pp=2, schedule="ZBVZeroBubble", ac="full", encoder_ac="full"
    ),
    layout("fsdp2.cp2, compile, full checkpointing", 4, cp=2, compile=True, ac="full"),
    layout(
        "tp2.cp2, compile, selective", 4, tp=2, cp=2, compile=True, ac="selective", encoder_ac="selective"
    ),
    layout(
        "tp2.pp2, compile, full checkpointing",
        4,
        tp=2,
        pp=2,
        schedule="Interleaved1F1B",
        compile=True,
        ac="full",
    ),
    layout("tp4, tied", 4, tp=4, slots=4, model="small-qwen3-tied"),
    layout("cp4", 4, cp=4),
    layout("cp4, ulysses", 4, cp=4, method="ulysses"),
    layout("pp4", 4, pp=4),
]
ON_EIGHT = [
    layout("fsdp8, some ranks see text alone", 8),
    layout("replicate2.fsdp2.tp2", 8, replicate=2, tp=2),
    layout("fsdp2.tp2.cp2", 8, tp=2, cp=2, slots=4, sharing="on"),
    layout("fsdp2.tp2.pp2", 8, tp=2, pp=2),
    layout("fsdp2.cp2.pp2, ulysses", 8, cp=2, pp=2, method="ulysses", schedule="InterleavedZeroBubble"),
    layout("fsdp.tp2.cp2.pp2", 8, tp=2, cp=2, pp=2),
    layout("fsdp.tp2.cp2.pp2, all at once", 8, tp=2, cp=2, pp=2, schedule="Interleaved1F1B", rows=4,
           sharing="on", ac="selective", encoder_ac="selective", model="small-qwen3-tied"),
    layout("fsdp.tp2.cp2.pp2, ZBVZeroBubble, frozen", 8, tp=2, cp=2, pp=2, schedule="ZBVZeroBubble",
           freeze=["encoder"]),
    layout("cp8", 8, cp=8),
    layout("tp4.cp2", 8, tp=4, cp=2),
    layout("cp4.tp2, tied", 8, tp=2, cp=4, model="small-qwen3-tied"),
    layout("fsdp2.pp4", 8, pp=4),
    layout("tp2.cp2.pp2, compile", 8, tp=2, cp=2, pp=2, compile=True),
]  # fmt: skip
LAYOUTS = {each.name: each for each in [*ON_TWO, *ON_FOUR, *ON_EIGHT] if each.runs}

# One of each kind and the largest combination, for every run of the tests.
QUICK = (
    "fsdp2, tied, frozen encoder",
    "fsdp2, dinov3, muon, groups",
    "replicate2.fsdp2",
    "tp2, shared encoder",
    "tp2, llava, encoder heads",
    "cp2, onevision",
    "pp2, ZBVZeroBubble, tied",
    "fsdp.tp2.cp2.pp2, all at once",
)
QUICK = tuple(name for name in QUICK if name in LAYOUTS)


@dataclasses.dataclass(frozen=True)
class Row:
    layout: Layout
    found: Difference | None
    error: str = ""

    @property
    def equal(self) -> bool:
        d = self.found
        if d is None:
            return False
        return max(d.loss, d.norm, d.gradient, d.validation) <= BOUND and d.weight <= WEIGHT_BOUND

    def __str__(self) -> str:
        name = f"{self.layout.ranks}  {self.layout.name:42s}"
        if self.found is None:
            return f"{name} failed: {self.error.strip().splitlines()[-1]}"
        d = self.found
        verdict = "equal" if self.equal else "DIFFERENT"
        figures = " ".join(f"{value:8.1e}" for value in (d.loss, d.norm, d.gradient, d.weight, d.validation))
        return f"{name} {figures}  {verdict}  {d.worst}"


HEADING = f"{'ranks  layout':45s} {'loss':>8s} {'norm':>8s} {'gradient':>8s} {'weight':>8s} {'held out':>8s}"


class Comparison:
    """Runs layouts, and one process for each task that they train."""

    def __init__(self, steps: int = 5, validate: bool = True, timeout_s: float = 240) -> None:
        self.pool = Pool(timeout_s)
        self.steps, self.validate = steps, validate
        self.references: dict[str, Measured] = {}

    def reference(self, layout: Layout) -> Measured:
        task = {key: value for key, value in layout.changes.items() if key in TASK.values()}
        if repr(task) not in self.references:
            one = task | {"training.local_batch_size": SLOTS}
            self.references[repr(task)] = self.pool.run(1, train, one, 1, self.steps, self.validate)[0]
        return self.references[repr(task)]

    def row(self, layout: Layout) -> Row:
        reference = self.reference(layout)
        try:
            arguments = layout.changes, layout.ranks, self.steps, self.validate
            return Row(layout, compare(self.pool.run(layout.ranks, train, *arguments)[0], reference))
        except RankFailed as error:
            return Row(layout, None, str(error))

    def rows(self, layouts: Iterable[Layout]) -> Iterator[Row]:
        return (self.row(each) for each in layouts)
