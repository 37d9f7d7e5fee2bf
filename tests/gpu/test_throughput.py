"""Tokens a second and peak memory of a real step, printed; and that no way to make it faster changes the
losses.

pytest tests/gpu -s
"""

import dataclasses
import gc
import time
from pathlib import Path

import pytest
import torch

from tests.gpu.test_estimate import SIZES, Vocabulary
from tests.reference.small_run import SMALL, job_of
from torchtitan.build import build
from torchtitan.distributed.process_group import close_process_group, open_process_group
from torchtitan.train import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WAYS = {
    "eager": {},
    "compiled": {"compile.enable": True},
    "compiled, one CUDA graph": {"compile.enable": True, "compile.cuda_graphs": True},
}
WARM_UP, TIMED = 6, 10


def losses_and_rate(ways: dict, folder: Path) -> tuple[list[float], str]:
    job = job_of(SIZES | ways | {"training.steps": WARM_UP + TIMED, "optimizer.lr": 1e-4}, str(folder))
    spec = dataclasses.replace(SMALL, load_tokenizer=lambda job: Vocabulary())
    gc.collect()  # a model of an earlier run goes only now
    device = open_process_group(job.comm, folder)
    try:
        trainer, losses = Trainer(build(job, spec, device)), []
        for step in range(WARM_UP + TIMED):
            if step == WARM_UP:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                started, tokens = time.perf_counter(), trainer.state.tokens
            trainer.train_step()
            losses.append(trainer.loss.clone())
        torch.cuda.synchronize()
        rate = (trainer.state.tokens - tokens) / (time.perf_counter() - started)
        trainer.close()
    finally:
        close_process_group()
    return [
        loss.item() for loss in losses
    ], f"{rate:,.0f} tokens/s, {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"


def test_every_way_gives_the_same_losses(tmp_path):
    found = {name: losses_and_rate(ways, tmp_path / name) for name, ways in WAYS.items()}
    for name, (losses, rate) in found.items():
        print(f"{torch.cuda.get_device_name()}, {SIZES['model.flavor']}, bfloat16, {name}: {rate}")
        assert losses == pytest.approx(found["eager"][0], rel=0.02)
