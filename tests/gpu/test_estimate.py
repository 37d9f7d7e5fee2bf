"""The estimated peak is what the allocator saw in a real step.

pytest tests/gpu
"""

import dataclasses
import gc
from pathlib import Path

import pytest
import torch

from experiments.vlm.estimate import estimate
from tests.reference.small_run import SMALL, job_of
from torchtitan.build import build
from torchtitan.config.layout import degrees
from torchtitan.distributed.process_group import close_process_group, open_process_group

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SIZES = {
    "model.flavor": "base-qwen2.5-0.5B",
    "training.seq_len": 2048,
    "training.local_batch_size": 2,
    "training.global_batch_size": 2,
    "training.mixed_precision_param": "bfloat16",
    "data.patch_size": 16,
    "data.patches_per_row": 4096,
}


class Vocabulary:
    vocab_size = 151936


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_peak_memory_is_as_estimated(tmp_path: Path, mode: str):
    job = job_of(
        SIZES | {"activation_checkpoint.mode": mode, "activation_checkpoint.encoder_mode": mode},
        str(tmp_path),
    )
    spec = dataclasses.replace(SMALL, load_tokenizer=lambda job: Vocabulary())
    estimated = estimate(job, degrees(job.parallelism, 1), Vocabulary.vocab_size).memory
    gc.collect()  # a model of an earlier test goes only now: FSDP makes circles of references
    before = torch.cuda.memory_allocated()
    device = open_process_group(job.comm, tmp_path)
    try:
        run = build(job, spec, device)
        for step in range(3):
            if step == 2:  # by then the optimizer has its state, and kernels are tuned
                torch.cuda.reset_peak_memory_stats()
            run.forward_backward(run.to_rank(next(run.loader).batches[0]), 1e-4, True)
            run.optimizers.step()
            run.optimizers.zero_grad()
        measured = torch.cuda.max_memory_allocated() - before
    finally:
        close_process_group()
    print(
        f"{torch.cuda.get_device_name()}, checkpointing {mode}: {measured / 2**30:.2f} GiB, estimated "
        f"{estimated.total / 2**30:.2f}"
    )
    assert estimated.total == pytest.approx(measured, rel=0.1), estimated
