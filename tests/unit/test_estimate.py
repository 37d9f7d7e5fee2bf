"""Memory, FLOPs and traffic of layouts that nobody runs, against counts made one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.commands import main
from experiments.vlm.batch import Batch
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.costs.estimate import estimate, estimates, with_degrees
from experiments.vlm.costs.flops import count_flops
from experiments.vlm.model import vit
from experiments.vlm.model.flavors import FLAVORS
from experiments.vlm.model.vlm import VLM
from torchtitan.config.errors import ConfigError
from torchtitan.config.layout import Degrees, degrees
from torchtitan.distributed.estimate import factorisations, in_flight

FLAVOR = "so400m-llama3.1-8B"
VOCAB = 128256
ONE = Degrees(1, 1, 1, 1, 1)


@pytest.mark.parametrize("freeze", [[], ["encoder"], ["encoder", "decoder"], ["projector"]])
def test_flops_of_a_full_step_are_those_counted_in_a_full_batch(freeze):
    job = VLMJobConfig()
    job.training.seq_len, job.data.patches_per_row, job.data.max_patches_per_image = 64, 96, 16
    job.training.freeze, job.training.local_batch_size = freeze, 1
    raster = torch.tensor(
        [[0, h, w] for _ in range(6) for h in range(4) for w in range(4)], dtype=torch.int32
    )
    tensors = {
        "positions": torch.arange(64)[None],
        "document_ids": torch.zeros(1, 64, dtype=torch.int32),
        "grid_thw": raster[None],
    }
    batch = Batch(tensors, {"tokens": 64, "patches": 96}, [])
    with torch.device("meta"):
        model = VLM(FLAVORS["debugmodel"], VOCAB, "sdpa", 64)
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
    assert states["AdamW", False] - states["Muon", False] == pytest.approx(
        4 * (8.47e9 - tables) / 8, rel=0.01
    )
    assert states["AdamW", True] < 0.01 * states["AdamW", False]


class Gated(nn.Module):
    """An MLP of three matrices in place of the encoder's two."""

    def __init__(self, config):
        super().__init__()
        self.fc1, self.gate = (nn.Linear(config.dim, config.mlp_dim) for _ in range(2))
        self.fc2 = nn.Linear(config.mlp_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.gate(x)) * self.fc1(x))


def test_a_layer_that_nobody_spoke_of_is_estimated(monkeypatch):
    before = estimate(job_of(), ONE, VOCAB).memory
    monkeypatch.setattr(vit, "EncoderMLP", Gated)
    after, encoder = estimate(job_of(), ONE, VOCAB).memory, FLAVORS[FLAVOR].encoder
    # Per layer a further matrix with biases, each with two moments in float32; and, kept in bfloat16, two
    # results more.
    assert after.state - before.state == 12 * encoder.layers * (encoder.dim + 1) * encoder.mlp_dim
    assert after.kept - before.kept == 2 * 2 * encoder.layers * 8192 * encoder.mlp_dim


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


@pytest.mark.slow
def test_thousands_of_ranks_cost_nothing():
    found = list(estimates(job_of(), 4096, VOCAB, Degrees(1, 4096, 16, 8, 16)))
    assert len(found) > 50
    assert all(e.sizes.ranks == 4096 and e.memory.total > 0 for e in found)
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
    # Gathered for forward and for backward in bfloat16 (the output layer once), summed once in float32; 7 of
    # 8 parts come from elsewhere.
    assert sent == {
        "fsdp all-gather": pytest.approx(2 * (2 * parameters - table) * 7 / 8, rel=1e-6),
        "fsdp reduce-scatter": pytest.approx(4 * parameters * 7 / 8, rel=1e-6),
    }
    sent = estimate(job_of(), Degrees(1, 1, 2, 1, 1), VOCAB).sent
    # Keys and values of 2,048 tokens, 8 heads of 128, in bfloat16, of 32 layers; as much back as gradients.
    assert sent["cp all-gather"] == sent["cp reduce-scatter"] == 32 * 2 * 2 * 2048 * 8 * 128


def test_what_crosses_a_group_when_the_decoder_is_frozen_or_its_ends_are_one(monkeypatch):
    job = job_of()
    job.training.freeze = ["decoder"]
    frozen = estimate(job, Degrees(1, 8, 1, 1, 1), VOCAB).sent
    # Gradients pass through all but the table, so the rest is gathered for backward too.
    trained = estimate(job_of(), Degrees(1, 8, 1, 1, 1), VOCAB).sent["fsdp all-gather"]
    assert frozen["fsdp all-gather"] == trained - 2 * VOCAB * 4096 * 7 / 8
    job = job_of()
    job.model.flavor = "so400m-llama3.2-1B"
    assert estimate(job, Degrees(1, 2, 1, 1, 2), VOCAB).sent["pp tied embedding"] == 4 * VOCAB * 2048 / 2
    # One rank holds both ends of this schedule, which older versions of torch cannot run.
    monkeypatch.setattr("torchtitan.config.check.zero_bubble_works", lambda: True)
    job.parallelism.pipeline_parallel_schedule = "ZBVZeroBubble"
    assert "pp tied embedding" not in estimate(job, Degrees(1, 2, 1, 1, 2), VOCAB).sent


def meta_model() -> VLM:
    with torch.device("meta"):
        return VLM(FLAVORS[FLAVOR], VOCAB, "sdpa", 1024)


def test_stages_early_in_a_pipeline_hold_more_microbatches():
    assert [in_flight("1F1B", rank, 4, 8) for rank in range(4)] == [[(4,)], [(3,)], [(2,)], [(1,)]]
    assert in_flight("GPipe", 3, 4, 8) == [(8,)]
    moments = in_flight("Interleaved1F1B", 0, 2, 4)
    assert all(0 <= n <= 4 for counts in moments for n in counts) and max(map(sum, moments)) == 5


def ask(*options: str) -> int:
    return main(["estimate", "--model.flavor", FLAVOR, *options])


def test_the_command_reports_the_job_and_what_else_fits(capsys):
    few = ("--rows", "3", "--max_tp", "2", "--max_cp", "2", "--max_pp", "2")
    assert ask("--world_size", "512", "--training.global_batch_size", "100", *few) == 0
    printed = capsys.readouterr().out
    for expected in (
        "fsdp512:",
        "100 -> 4096",
        "peak memory a rank",
        "fsdp all-gather",
        "layouts fit 80 GiB",
    ):
        assert expected in printed


def test_the_command_names_what_is_wrong(capsys):
    assert (
        ask("--world_size", "6", "--parallelism.tensor_parallel_degree", "3", "--training.seq_len", "4095")
        == 2
    )
    assert "tensor_parallel_degree" in capsys.readouterr().err


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
def test_the_command_refuses_what_training_would(option, value, capsys):
    assert ask(f"--{option}", value) == 2
    assert f"{option} " in capsys.readouterr().err
