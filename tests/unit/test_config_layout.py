"""How ranks, batches and GPUs are counted before anything is built."""

import os

import pytest

from experiments.vlm.model.flavors import FLAVORS
from torchtitan.config import devices
from torchtitan.config.devices import visible_gpus
from torchtitan.config.errors import ConfigError
from torchtitan.config.job import JobConfig, Parallelism
from torchtitan.config.layout import BatchSizes, Degrees, degrees, resolve_batch
from torchtitan.models.decoder.check import check_decoder


def test_degrees_fill_what_is_left():
    assert degrees(Parallelism(tensor_parallel_degree=2, data_parallel_replicate_degree=2), 16) == Degrees(
        2, 4, 1, 2, 1
    )
    assert degrees(Parallelism(), 1) == Degrees(1, 1, 1, 1, 1)
    assert degrees(Parallelism(data_parallel_replicate_degree=2, data_parallel_shard_degree=3), 6).dp == 6


def test_batch_sizes_multiply_to_the_global_batch():
    job = JobConfig()
    job.training.local_batch_size, job.training.global_batch_size = 2, 24
    assert resolve_batch(job, 4) == BatchSizes(2, 24, 3)
    job.training.global_batch_size = -1
    assert resolve_batch(job, 4) == BatchSizes(2, 8, 1)


def test_tensor_parallel_must_divide_query_heads_too():
    job = JobConfig()
    decoder = FLAVORS["base-qwen2.5-0.5B"].decoder  # 14 heads, 2 of keys and values
    check_decoder(decoder, job, Degrees(1, 1, 1, 2, 1))
    with pytest.raises(ConfigError, match="does not divide the 14 heads"):
        check_decoder(decoder, job, Degrees(1, 1, 1, 4, 1))


@pytest.mark.parametrize(
    ("allowed", "gpus"), [(None, 2), ("0", 1), ("0,1", 2), ("", 0), ("-1", 0), ("1,-1,0", 1), ("0,1,2", 2)]
)
def test_visible_gpus_obey_cuda_visible_devices(allowed, gpus, tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho '  MIG 1g'\necho 'GPU 1: A (UUID: y)'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if allowed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    assert visible_gpus() == gpus


def test_gpus_are_counted_without_the_tools_that_list_them(tmp_path, monkeypatch):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "DEVICE_FILES", tmp_path)
    assert visible_gpus() == 2
