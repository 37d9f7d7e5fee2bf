"""Memory, FLOPs and traffic in closed form, against what autograd keeps and against counts made one by one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.vlm.batch import Batch
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.estimate import Patches, encoder_layer_kept, estimate, estimates, with_degrees
from experiments.vlm.flops import count_flops
from experiments.vlm.model.flavors import FLAVORS, EncoderConfig, ProjectorConfig, VLMConfig
from experiments.vlm.model.vit import EncoderBlock
from experiments.vlm.model.vlm import VLM
from torchtitan.config.errors import ConfigError
from torchtitan.config.layout import Degrees, degrees
from torchtitan.distributed.estimate import factorisations, in_flight
from torchtitan.layers import rope
from torchtitan.layers.attention import prepare_mask
from torchtitan.layers.masks import Mask
from torchtitan.models.decoder import footprint
from torchtitan.models.decoder.flavors import DecoderConfig
from torchtitan.models.decoder.footprint import Share
from torchtitan.models.decoder.model import Block

FLAVOR = "so400m-llama3.1-8B"
VOCAB = 128256
ONE = Degrees(1, 1, 1, 1, 1)


def bytes_kept(run, beside: list[torch.Tensor]) -> int:
    """Of all storages that autograd keeps, but for those of `beside`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in beside}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("trains", [True, False], ids=["trains", "frozen"])
def test_a_decoder_layer_keeps_what_the_formula_says(qk_norm, dtype, trains):
    config = DecoderConfig(64, 1, 8, 4, 8, 192, 128, 1e4, qk_norm=qk_norm)
    block, slots, length = Block(config, "sdpa").to(dtype).requires_grad_(trains), 2, 128
    h = torch.randn(slots, length, config.dim, dtype=dtype, requires_grad=True)
    cos, sin = rope.angles(torch.arange(length).expand(slots, -1), config.head_dim, 1e4, None)
    mask = prepare_mask(Mask(torch.zeros(slots, length, dtype=torch.int32), causal=True), "sdpa")
    beside = [*block.parameters(), cos, sin, *(part for part in mask if torch.is_tensor(part))]
    share = Share(slots, length, 1, 1, "allgather", dtype.itemsize, fused_norm=False, trains=trains)
    kept = bytes_kept(lambda: block(h, cos, sin, mask), beside)
    norms = 2 + qk_norm * (config.heads + config.kv_heads)  # each keeps one number a row, which the formula leaves out
    assert kept == footprint.layer_kept(config, share) + 4 * norms * slots * length


def test_an_encoder_layer_keeps_what_the_formula_says():
    config = EncoderConfig(64, 1, 4, 256, patch_size=4)
    block, x = EncoderBlock(config, "sdpa"), torch.randn(2, 128, 64, requires_grad=True)
    mask = prepare_mask(Mask(torch.zeros(2, 128, dtype=torch.int32), causal=False), "sdpa")
    kept = bytes_kept(lambda: block(x, mask), [*block.parameters(), *(part for part in mask if torch.is_tensor(part))])
    vlm = VLMConfig(config, ProjectorConfig(8), FLAVORS["debugmodel"].decoder)
    assert kept == pytest.approx(encoder_layer_kept(vlm, Patches(256, 256, 1, 4)), rel=0.01)


@pytest.mark.parametrize("freeze", [[], ["encoder"], ["encoder", "decoder"], ["projector"]])
def test_flops_of_a_full_step_are_those_counted_in_a_full_batch(freeze):
    job = VLMJobConfig()
    job.training.seq_len, job.data.patches_per_row, job.data.max_patches_per_image = 64, 96, 16
    job.training.freeze, job.training.local_batch_size = freeze, 1
    raster = torch.tensor([[0, h, w] for _ in range(6) for h in range(4) for w in range(4)], dtype=torch.int32)
    tensors = {"positions": torch.arange(64)[None], "document_ids": torch.zeros(1, 64, dtype=torch.int32), "grid_thw": raster[None]}
    batch = Batch(tensors, {"tokens": 64, "patches": 96}, [])
    with torch.device("meta"):
        model = VLM(FLAVORS["debugmodel"], VOCAB, 2, "sdpa", 64)
    for part in freeze:
        model.get_submodule(part).requires_grad_(False)
    assert estimate(job, ONE, VOCAB).flops == count_flops(model)(batch)


def job_of(**changes) -> VLMJobConfig:
    job = VLMJobConfig()
    job.model.flavor = FLAVOR
    job.training.local_batch_size, job.training.seq_len, job.data.patches_per_row = 1, 4096, 8192
    for name, value in changes.items():
        setattr(job.parallelism, name, value)
    return job


def test_state_falls_with_the_shards_and_is_sixteen_bytes_a_parameter_less_gradients():
    one, many = (estimate(job_of(), Degrees(1, shards, 1, 1, 1), VOCAB).memory.state for shards in (1, 64))
    # 8.03 billion of the decoder, 0.43 of the encoder and projector; 4 + 8 bytes each.
    assert one == pytest.approx(12 * 8.47e9, rel=0.01)
    assert many < one / 50


def test_state_is_that_of_the_optimizer_and_of_the_device():
    states = {}
    for name, offload in (("AdamW", False), ("Muon", False), ("AdamW", True)):
        job = job_of()
        job.optimizer.name, job.training.enable_cpu_offload = name, offload
        states[name, offload] = estimate(job, Degrees(1, 8, 1, 1, 1), VOCAB).memory.state
    tables = 2 * VOCAB * 4096  # embedding and output layer stay with AdamW
    assert states["AdamW", False] - states["Muon", False] == pytest.approx(4 * (8.47e9 - tables) / 8, rel=0.01)
    assert states["AdamW", True] < 0.01 * states["AdamW", False]


def test_recomputation_trades_memory():
    peaks = {}
    for mode in ("none", "selective", "full"):
        job = job_of()
        job.activation_checkpoint.mode = job.activation_checkpoint.encoder_mode = mode
        peaks[mode] = estimate(job, Degrees(1, 8, 1, 1, 1), VOCAB).memory.total
    assert peaks["full"] < peaks["selective"] < peaks["none"]


def test_a_global_batch_that_does_not_divide_is_made_to_and_told():
    job = job_of()
    job.training.global_batch_size = 100
    found = estimate(job, Degrees(1, 64, 1, 1, 1), VOCAB)
    assert found.batch.global_ == 64 and "100 -> 64" in found.notes[0]


def test_a_pipeline_gets_a_microbatch_for_each_stage():
    found = estimate(job_of(), Degrees(1, 2, 1, 1, 4), VOCAB)
    assert found.batch.local == 4 and found.notes


def test_an_interleaved_pipeline_gets_rounds_that_it_can_deal():
    job = job_of(pipeline_parallel_schedule="Interleaved1F1B")
    job.training.local_batch_size = 5
    assert [estimate(job, Degrees(1, 2, 1, 1, pp), VOCAB).batch.local for pp in (2, 4)] == [6, 5]


def test_a_layout_that_cannot_run_is_refused():
    with pytest.raises(ConfigError, match="tensor_parallel_degree"):
        estimate(job_of(), Degrees(1, 1, 1, 16, 1), VOCAB)


def test_thousands_of_ranks_cost_nothing():
    found = list(estimates(job_of(), 4096, VOCAB, Degrees(1, 4096, 16, 8, 16)))
    assert len(found) > 50
    assert all(e.ranks == 4096 and e.memory.total > 0 for e in found)
    # The job's own degrees were replaced, and -1 resolved.
    job = with_degrees(job_of(tensor_parallel_degree=8), found[0].sizes)
    assert degrees(job.parallelism, 4096) == found[0].sizes


def test_every_mesh_is_listed_once():
    meshes = list(factorisations(24, Degrees(2, 24, 4, 8, 3)))
    assert len(set(meshes)) == len(meshes)
    assert Degrees(2, 1, 2, 2, 3) in meshes and Degrees(1, 24, 1, 1, 1) in meshes
    assert all(m.dp * m.cp * m.tp * m.pp == 24 and m.tp <= 8 and m.pp <= 3 for m in meshes)


def test_what_crosses_a_group():
    sent = estimate(job_of(), Degrees(1, 8, 1, 1, 1), VOCAB).sent
    parameters, table = sum(p.numel() for p in meta_model().parameters()), VOCAB * 4096
    # Gathered for forward and for backward in bfloat16 (the output layer once), summed once in float32; 7 of 8 parts come from elsewhere.
    assert sent == {
        "fsdp all-gather": pytest.approx(2 * (2 * parameters - table) * 7 / 8, rel=1e-6),
        "fsdp reduce-scatter": pytest.approx(4 * parameters * 7 / 8, rel=1e-6),
    }
    sent = estimate(job_of(), Degrees(1, 1, 2, 1, 1), VOCAB).sent
    # Keys and values of 2,048 tokens, 8 heads of 128, in bfloat16, of 32 layers; as much back as gradients.
    assert sent["cp keys and values"] == 2 * 32 * 2 * 2 * 2048 * 8 * 128


def test_what_crosses_a_group_when_the_decoder_is_frozen_or_its_ends_are_one():
    job = job_of()
    job.training.freeze = ["decoder"]
    frozen = estimate(job, Degrees(1, 8, 1, 1, 1), VOCAB).sent
    # Gradients pass through it, so it is gathered for backward too.
    assert frozen["fsdp all-gather"] == estimate(job_of(), Degrees(1, 8, 1, 1, 1), VOCAB).sent["fsdp all-gather"]
    job = job_of()
    job.model.flavor = "so400m-llama3.2-1B"
    assert estimate(job, Degrees(1, 2, 1, 1, 2), VOCAB).sent["pp tied embedding"] == 4 * VOCAB * 2048 / 2
    job.parallelism.pipeline_parallel_schedule = "ZBVZeroBubble"
    assert "pp tied embedding" not in estimate(job, Degrees(1, 2, 1, 1, 2), VOCAB).sent  # one rank holds both ends


def meta_model() -> VLM:
    with torch.device("meta"):
        return VLM(FLAVORS[FLAVOR], VOCAB, 2, "sdpa", 1024)


def test_stages_early_in_a_pipeline_hold_more_microbatches():
    assert [in_flight("1F1B", rank, 4, 8) for rank in range(4)] == [[(4,)], [(3,)], [(2,)], [(1,)]]
    assert in_flight("GPipe", 3, 4, 8) == [(8,)]
    moments = in_flight("Interleaved1F1B", 0, 2, 4)
    assert all(0 <= n <= 4 for counts in moments for n in counts) and max(map(sum, moments)) == 5


def ask(*options: str) -> subprocess.CompletedProcess:
    script = Path(__file__).parents[2] / "scripts" / "estimate_memory.py"
    return subprocess.run([sys.executable, script, "--model.flavor", FLAVOR, *options], capture_output=True, text=True)


def test_the_script_tells_the_job_and_what_else_fits():
    told = ask("--world_size", "512", "--training.global_batch_size", "100", "--rows", "3")
    assert told.returncode == 0, told.stderr
    for expected in ("fsdp512:", "100 -> 4096", "peak memory a rank", "fsdp all-gather", "layouts fit 80 GiB"):
        assert expected in told.stdout


def test_the_script_names_what_is_wrong():
    told = ask("--world_size", "6", "--parallelism.tensor_parallel_degree", "3", "--training.seq_len", "4095")
    assert told.returncode == 2 and "tensor_parallel_degree" in told.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("world_size", "0"),
        ("memory_gib", "-1"),
        ("training.local_batch_size", "0"),
        ("parallelism.tensor_parallel_degree", "0"),
        ("activation_checkpoint.selective_ac_option", "ops"),
        ("training.freeze", "encodr"),
        ("data.patches_per_row", "10"),
    ],
)
def test_the_script_refuses_what_training_would(option, value):
    told = ask(f"--{option}", value)
    assert told.returncode == 2 and f"{option} " in told.stderr and "Traceback" not in told.stderr
