"""The estimated peak and traffic are those of a real step on gloo ranks: tensors that are alive, bytes that
are sent.
"""

import dataclasses
import tempfile

import pytest
import torch.distributed as dist

from experiments.vlm.costs.estimate import estimate
from experiments.vlm.model.config import EncoderConfig, ProjectorConfig, TilesConfig, VLMConfig
from experiments.vlm.model.flavors import FLAVORS
from experiments.vlm.model.towers import dinov3
from tests.distributed.pool import Pool
from tests.distributed.table import layout
from tests.reference.live_memory import LiveMemory
from tests.reference.sent_bytes import SentBytes
from tests.reference.small_run import CPU, SMALL, VOCAB, job_of
from torchtitan.build import build
from torchtitan.config.layout import degrees
from torchtitan.models.decoder.flavors import DecoderConfig

TOLERANCE = 0.1
ENCODER = EncoderConfig(128, 4, 4, 512, patch_size=4, position_grid=8)
DECODER = DecoderConfig(128, 6, 8, 4, 16, 384, VOCAB, 10000.0, norm_eps=1e-5)
FLAVORS["estimated"] = VLMConfig(ENCODER, ProjectorConfig(96), DECODER)
FLAVORS["estimated-tied"] = VLMConfig(
    ENCODER, ProjectorConfig(96), dataclasses.replace(DECODER, tied_embeddings=True)
)
FLAVORS["estimated-dinov3"] = VLMConfig(
    EncoderConfig(128, 6, 4, 512, 4, **dinov3.KIND, **dinov3.PLAIN, gated_mlp=True, feature_layers=(1, -3)),
    ProjectorConfig(96),
    DECODER,
)
FLAVORS["estimated-tiles"] = VLMConfig(
    dataclasses.replace(ENCODER, image_size=32),
    ProjectorConfig(128, False, 1, newline=True),
    DECODER,
    "llava_onevision",
    "tiles",
    TilesConfig(((1, 2), (2, 1)), most=1, alone=True),
)
SIZES = {
    "model.flavor": "estimated",
    "training.seq_len": 256,
    "data.patches_per_row": 512,
    "training.loss_chunk_tokens": 128,
}


def changes_of(case, accumulation: int) -> dict:
    own = case.changes
    split = [own.get(f"parallelism.{kind}_parallel_degree", 1) for kind in ("tensor", "context", "pipeline")]
    data = case.ranks // (split[0] * split[1] * split[2])
    return (
        SIZES | own | {"training.global_batch_size": own["training.local_batch_size"] * data * accumulation}
    )


def measured_peak(changes: dict) -> int:
    """Bytes, in the second step, when the optimizer has its state."""
    with tempfile.TemporaryDirectory() as folder:
        run = build(job_of(changes, folder), SMALL, CPU)
        for _ in range(2):
            first, *more = next(run.state.loader).batches
            feed = run.to_rank(first)
            memory = LiveMemory()
            state = [
                value
                for optimizer in run.state.optimizers
                for values in optimizer.state.values()
                for value in values.values()
            ]
            memory.add([list(part.parameters()) for part in run.forward_backward.parts], state, feed)
            with memory:
                run.forward_backward(feed, 1e-3, not more)
                for number, batch in enumerate(more, 1):
                    run.forward_backward(run.to_rank(batch), 1e-3, number == len(more))
                for optimizer in run.state.optimizers:
                    optimizer.step()
                run.state.optimizers.zero_grad()
        dist.barrier()
        return memory.peak


def measured_traffic(changes: dict) -> float:
    """Bytes that this rank sends in a step."""
    with tempfile.TemporaryDirectory() as folder:
        run = build(job_of(changes, folder), SMALL, CPU)
        batches = next(run.state.loader).batches
        with SentBytes() as sent:
            for number, batch in enumerate(batches, 1):
                run.forward_backward(run.to_rank(batch), 1e-3, number == len(batches))
            run.state.optimizers.step()
        dist.barrier()
        return sent.total


# All of some layers, parts of others, and what comes before the first that trains.
FREEZE = [r"encoder\.(emb|layers\.[01]\.)", "bias", r"decoder\.layers\.[1-4]\.attention\.w[kv]", "embeddings"]
CASES = [
    layout("one process", 1, slots=2),
    layout("full checkpointing", 1, slots=2, ac="full", encoder_ac="full"),
    layout("tp2", 2, slots=2, tp=2),
    layout("fsdp2, frozen by pattern", 2, slots=2, freeze=FREEZE),
    layout("pp2, ZBVZeroBubble", 2, slots=4, pp=2, schedule="ZBVZeroBubble"),
]
FURTHER = [
    layout("selective by operator", 1, slots=2, ac="selective", encoder_ac="selective"),
    layout("selective by layer", 1, slots=2, ac="selective", encoder_ac="selective", every="2"),
    layout("fsdp2", 2, slots=2),
    layout("fsdp2, never resharded", 2, slots=2, reshard="never"),
    layout("cp2", 2, slots=2, cp=2),
    layout("cp2, ulysses", 2, slots=2, cp=2, method="ulysses"),
    layout("fsdp2.tp2, encoder heads", 4, slots=2, tp=2, heads=True),
    layout("pp2", 2, slots=4, pp=2),
    layout("pp2, GPipe", 2, slots=4, pp=2, schedule="GPipe"),
    layout("pp2, Interleaved1F1B", 2, slots=8, pp=2, schedule="Interleaved1F1B"),
    layout("pp2, InterleavedZeroBubble", 2, slots=8, pp=2, schedule="InterleavedZeroBubble"),
    layout("fsdp2, frozen encoder", 2, slots=2, freeze=["encoder"]),
    layout("fsdp2, frozen decoder", 2, slots=2, freeze=["decoder"]),
    layout("fsdp2, frozen by half", 2, slots=2, freeze=["encoder", "projector", "tok_emb", "layers.[0-2]"]),
    layout("tp2, lora", 2, slots=2, tp=2, lora=4, adapted=["layers"]),
    layout("fsdp2, lora", 2, slots=2, lora=16, freeze=["encoder", "projector"]),
    layout("fsdp2, fp8", 2, slots=2, fp8=True, emulate=True, in_fp8=["encoder", "decoder"]),
    layout("pp2, frozen by pattern", 2, slots=4, pp=2, freeze=FREEZE),
    layout("fsdp2, muon", 2, slots=2, optimizer="Muon"),
    layout("fsdp2, tied", 2, slots=2, model="estimated-tied"),
    layout("fsdp2, dinov3, layers behind the feature", 2, slots=2, model="estimated-dinov3"),
    layout("tiles, newlines and sums", 1, slots=2, model="estimated-tiles"),
    layout("tp2, tiles, newlines and sums", 2, slots=2, tp=2, model="estimated-tiles"),
    layout("tp2, dinov3, frozen encoder", 2, slots=2, tp=2, model="estimated-dinov3", freeze=["encoder"]),
]


def compare(pool: Pool, case, accumulation: int = 1) -> None:
    changes = changes_of(case, accumulation)
    job = job_of(changes, "/nowhere")
    expected = estimate(job, degrees(job.parallelism, case.ranks), VOCAB, on_gpu=False).memory
    measured = max(pool.run(case.ranks, measured_peak, changes))
    assert expected.total == pytest.approx(measured, rel=TOLERANCE), expected


@pytest.mark.parametrize("case", [case for case in CASES if case.runs], ids=lambda case: case.name)
def test_peak_is_as_measured(pool, case):
    compare(pool, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in FURTHER if case.runs], ids=lambda case: case.name)
def test_peak_is_as_measured_in_further_layouts(pool, case):
    compare(pool, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        layout("fsdp2", 2, slots=1),
        layout("replicate2.fsdp2", 4, slots=1, replicate=2),
        layout("pp2", 2, pp=2),
    ],
    ids=lambda case: case.name,
)
def test_peak_is_as_measured_with_accumulation(pool, case):
    compare(pool, case, accumulation=3)


SENT = [
    # Where a whole group before the first that trains is frozen, FSDP fetches one such group in vain.
    layout("fsdp2, frozen by pattern", 2, slots=2, freeze=["bias", r"\.w[kv]\."]),
    layout("fsdp2, frozen decoder", 2, slots=2, freeze=["decoder"]),
    layout("tp2, shared encoder", 2, slots=2, tp=2),
    layout("tp2, lora", 2, slots=2, tp=2, lora=4, adapted=["layers"]),
    layout("cp2", 2, slots=1, cp=2),
    layout("pp2", 2, slots=4, pp=2),
    layout("fsdp2, muon", 2, slots=2, optimizer="Muon"),
    layout("tp2, muon", 2, slots=2, tp=2, optimizer="Muon"),
    layout("tp2, selective by operator", 2, slots=2, tp=2, ac="selective", encoder_ac="selective"),
]
SENT_TOO = [
    layout("fsdp2.tp2, muon", 4, slots=2, tp=2, optimizer="Muon"),
    layout("tp2, full checkpointing", 2, slots=2, tp=2, ac="full", encoder_ac="full"),
    layout("cp2, ulysses, selective by operator", 2, slots=2, cp=2, method="ulysses", ac="selective"),
    layout("cp2, full checkpointing", 2, slots=2, cp=2, ac="full"),
]


def compare_traffic(pool: Pool, case) -> None:
    changes = changes_of(case, accumulation=2)
    job = job_of(changes, "/nowhere")
    expected = estimate(job, degrees(job.parallelism, case.ranks), VOCAB, on_gpu=False).sent
    counted = max(pool.run(case.ranks, measured_traffic, changes))
    assert sum(expected.values()) == pytest.approx(counted, rel=0.005), expected


@pytest.mark.parametrize("case", SENT, ids=lambda case: case.name)
def test_traffic_is_as_counted(pool, case):
    compare_traffic(pool, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SENT_TOO, ids=lambda case: case.name)
def test_traffic_is_as_counted_in_further_layouts(pool, case):
    compare_traffic(pool, case)
