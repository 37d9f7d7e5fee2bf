"""Every layout, recomputation or way to compile that cannot be is one line that names the key."""

import pytest

from experiments.__main__ import checked_job
from tests.reference.wrong_jobs import CP2, DATA, FLAVOR_1B, PP2, TP2, ZERO_BUBBLE, P, told
from torchtitan.config import check as checks

pytestmark = pytest.mark.usefixtures("repository_without_gpu")

# (options, processes, the key that the message must name)
WRONG = [
    # processes
    (TP2, 1, "parallelism.tensor_parallel_degree (2) must divide the number of processes (1)"),
    ([P + "data_parallel_shard_degree", "3"], 2, "parallelism.data_parallel_shard_degree (3)"),
    ([P + "data_parallel_replicate_degree", "2"], 3, "parallelism.data_parallel_replicate_degree (2)"),
    ([P + "data_parallel_shard_degree", "0"], 1, "parallelism.data_parallel_shard_degree"),
    ([P + "context_parallel_degree", "0"], 1, "parallelism.context_parallel_degree"),
    (
        ["--parallelism.tensor_parallel_degree", "4"],
        4,
        "parallelism.tensor_parallel_degree = 4 does not divide the 2 key/value heads",
    ),
    (
        ["--parallelism.tensor_parallel_degree", "3", "--training.seq_len", "2049"],
        3,
        "parallelism.tensor_parallel_degree = 3",
    ),
    ([*TP2, "--training.seq_len", "2047"], 2, "training.seq_len = 2047"),
    ([*CP2, "--training.seq_len", "2049"], 2, "training.seq_len = 2049"),
    ([*CP2, "--training.seq_len", "2052"], 2, "parallelism.context_parallel_load_balance"),
    (
        [*CP2, *TP2, P + "context_parallel_method", "ulysses"],
        4,
        "parallelism.context_parallel_method = ulysses",
    ),
    (
        [P + "enable_async_tensor_parallel"],
        1,
        "parallelism.enable_async_tensor_parallel needs parallelism.tensor_parallel_degree",
    ),
    ([*TP2, P + "enable_async_tensor_parallel"], 2, "needs compile.enable"),
    (
        [*TP2, P + "enable_async_tensor_parallel", "--compile.enable"],
        2,
        "parallelism.enable_async_tensor_parallel needs a GPU",
    ),
    ([P + "encoder_tensor_parallel"], 1, "parallelism.encoder_tensor_parallel"),
    ([*TP2, P + "encoder_tensor_parallel", P + "encoder_sharing", "on"], 2, "parallelism.encoder_sharing"),
    (
        [*TP2, P + "encoder_sharing", "on", "--training.local_batch_size", "3"],
        2,
        "parallelism.encoder_sharing = on: 3 patch rows",
    ),
    ([P + "pipeline_parallel_split_points", "1"], 1, "parallelism.pipeline_parallel_split_points"),
    ([P + "pipeline_parallel_encoder_stage"], 1, "parallelism.pipeline_parallel_encoder_stage"),
    ([P + "pipeline_parallel_schedule", "1F1G"], 1, "did you mean 1F1B?"),
    (
        [*PP2, P + "pipeline_parallel_microbatch_size", "3"],
        2,
        "parallelism.pipeline_parallel_microbatch_size = 3",
    ),
    (
        [*PP2, P + "pipeline_parallel_microbatch_size", "8"],
        2,
        "parallelism.pipeline_parallel_microbatch_size = 8",
    ),
    (
        [*PP2, P + "pipeline_parallel_split_points", "3"],
        2,
        "parallelism.pipeline_parallel_split_points = [3]",
    ),
    (
        [*PP2, P + "pipeline_parallel_split_points", "1", "2"],
        2,
        "parallelism.pipeline_parallel_split_points = [1, 2]: makes 3 stages",
    ),
    (
        [*PP2, P + "pipeline_parallel_encoder_stage", P + "pipeline_parallel_split_points", "1"],
        2,
        "must begin with 0",
    ),
    (
        [*PP2, P + "pipeline_parallel_schedule", "Interleaved1F1B"],
        2,
        "parallelism.pipeline_parallel_degree = 2 makes 4 stages",
    ),
    (
        [
            *PP2,
            *FLAVOR_1B,
            P + "pipeline_parallel_schedule",
            "Interleaved1F1B",
            "--training.local_batch_size",
            "5",
        ],
        2,
        "cannot deal in 2 equal rounds",
    ),
]
AC = "--activation_checkpoint."
WRONG += [
    ([*ZERO_BUBBLE, P + "fsdp_reshard_after_forward", "always"], 2, "parallelism.fsdp_reshard_after_forward"),
    ([*ZERO_BUBBLE, "--compile.enable"], 2, "compile.enable"),
    ([*ZERO_BUBBLE, "--activation_checkpoint.mode", "selective"], 2, "activation_checkpoint.mode"),
    (
        [*ZERO_BUBBLE, "--activation_checkpoint.encoder_mode", "selective"],
        2,
        "activation_checkpoint.encoder_mode",
    ),
    (
        [*ZERO_BUBBLE, "--activation_checkpoint.selective_layers", "1"],
        2,
        "activation_checkpoint.selective_layers",
    ),
    ([AC + "mode", "full", AC + "full_layers", "2"], 1, "activation_checkpoint.full_layers = 2"),
    (
        [AC + "encoder_mode", "full", AC + "memory_budget_gib", "70"],
        1,
        "activation_checkpoint.memory_budget_gib = 70",
    ),
    (
        [AC + "encoder_full_layers", "3", AC + "encoder_selective_layers", "4"],
        1,
        "the 4 layers that the encoder",
    ),
    ([AC + "full_layers", "-1"], 1, "activation_checkpoint.full_layers"),
]


@pytest.mark.parametrize(
    ("options", "world_size", "key"), WRONG, ids=[" ".join(options) + f" x{n}" for options, n, _ in WRONG]
)
def test_a_wrong_layout_is_told_by_its_key(options, world_size, key):
    assert key in told([*DATA, *options], world_size)


def test_a_zero_bubble_schedule_needs_the_torch_that_can_split_backward(monkeypatch):
    monkeypatch.setattr(checks, "zero_bubble_works", lambda: False)
    assert "parallelism.pipeline_parallel_schedule = ZBVZeroBubble needs torch 2.13" in told(
        [*DATA, *ZERO_BUBBLE], 2
    )


def test_a_cuda_graph_holds_no_pipeline(monkeypatch):
    monkeypatch.setattr(checks, "visible_gpus", lambda: 2)
    checked_job([*DATA, "--compile.cuda_graphs", *TP2], 2)
    message = told([*DATA, "--compile.cuda_graphs", *PP2, "--training.local_batch_size", "2"], 2)
    assert "compile.cuda_graphs needs parallelism.pipeline_parallel_degree = 1" in message


def test_a_cuda_graph_keeps_the_last_group_gathered(monkeypatch):
    monkeypatch.setattr(checks, "visible_gpus", lambda: 1)
    checked_job([*DATA, "--compile.cuda_graphs", P + "fsdp_reshard_after_forward", "never"], 1)
    message = told([*DATA, "--compile.cuda_graphs", P + "fsdp_reshard_after_forward", "always"], 1)
    assert (
        "compile.cuda_graphs needs parallelism.fsdp_reshard_after_forward = default or never, not always"
        in message
    )
