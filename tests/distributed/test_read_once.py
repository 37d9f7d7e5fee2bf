"""One of the ranks that hold the same slots reads: each image is decoded once, and every rank gets what it
would have read and decoded by itself, bit for bit.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from experiments.vlm.config import Source
from experiments.vlm.data import collate
from experiments.vlm.data.loader import Loader
from experiments.vlm.parallelism.read_once import encoded_runs
from experiments.vlm.parallelism.shard_batch import shard_batch
from tests.bad_samples import write_mixed
from tests.reference import small_run  # noqa: F401 (its flavors)
from tests.tiny_data import Characters, make_job, write_all
from torchtitan.config.layout import degrees
from torchtitan.distributed.collectives import agree_on_data, from_all_ranks
from torchtitan.distributed.mesh import build_mesh
from torchtitan.distributed.slot_group import slot_group

CPU = torch.device("cpu")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2, rows divide": (2, {"tensor_parallel_degree": 2}),
    "tp2, all encode all": (2, {"tensor_parallel_degree": 2, "encoder_sharing": "off"}),
    "tp2, heads, tiles with taps": (
        2,
        {"tensor_parallel_degree": 2, "encoder_tensor_parallel": True, "flavor": "small-onevision"},
    ),
    "tp2, heads": (2, {"tensor_parallel_degree": 2, "encoder_tensor_parallel": True}),
    "cp2.fsdp2": (4, {"context_parallel_degree": 2}),
    "pp2.cp2": (4, {"pipeline_parallel_degree": 2, "context_parallel_degree": 2}),
    "tp2.cp2.pp2": (
        8,
        {
            "tensor_parallel_degree": 2,
            "context_parallel_degree": 2,
            "pipeline_parallel_degree": 2,
            "pipeline_parallel_microbatch_size": 4,
        },
    ),
}
QUICK = ("tp2, heads, tiles with taps", "tp2.cp2.pp2")
TILES = {"seq_len": 512, "patches_per_row": 96, "patch_rows": 4}


def job_of(folder: Path, dump: Path, layout: dict[str, Any], **data: Any):
    flavor = layout.get("flavor", "debugmodel")
    data |= TILES if flavor != "debugmodel" else {}
    job = make_job(folder, dump, local_batch_size=4, global_batch_size=8, **data)
    job.data.sources.append(Source(name="bad", format="cc12m", path=str(folder / "bad")))
    for name, value in layout.items():
        setattr(job.model if name == "flavor" else job.parallelism, name, value)
    return job


def taken(loader: Loader, mesh: Any, steps: int) -> list[Any]:
    """What this rank's forwards get, with zeros for pixels that it does not encode, and what it counts."""
    job, shape, given = loader.job, loader.shape, []
    for _ in range(steps):
        for batch in next(loader).batches:
            pixels = torch.zeros_like(batch.tensors["pixel_values"])
            for start, end in encoded_runs(job, mesh, shape):
                pixels[start:end] = batch.tensors["pixel_values"][start:end]
            tensors = shard_batch(batch.tensors | {"pixel_values": pixels}, mesh, job)
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            given.append((tensors, batch.counts, batch.samples, batch.epochs))
    return given


def equal(ours: list[Any], theirs: list[Any]) -> bool:
    return all(
        a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])
        for a, b in zip(ours, theirs, strict=True)
    )


def read_both_ways(folder: Path, dump: Path, layout: dict[str, Any]) -> tuple[bool, int, int]:
    """Whether batches are equal, also where a run goes on; images decoded and images read, of all ranks."""
    job = job_of(folder, dump, layout)
    mesh = build_mesh(degrees(job.parallelism, dist.get_world_size()), CPU)
    place = {"rank": mesh.data.get_local_rank(), "ranks": mesh.data.size(), "agree": agree_on_data}
    decoded, decode = [], collate.decode_views
    collate.decode_views = lambda *arguments: decoded.append(1) or decode(*arguments)
    alone = Loader(job_of(folder, dump / "alone", layout), Characters(), **place)
    expected = taken(alone, mesh, 6)
    by_itself, group = len(decoded), slot_group(mesh)
    decoded.clear()
    loader = Loader(job, Characters(), group=group, **place)
    given = taken(loader, mesh, 3)
    saved = {
        key: piece for state in from_all_ranks(dict(loader.state_dict())) for key, piece in state.items()
    }
    loader.close()
    resumed = Loader(job, Characters(), group=group, **place)
    resumed.load_state_dict({key: saved[key] for key in resumed.slot_keys()})
    given += taken(resumed, mesh, 3)
    resumed.close()
    alone.close()
    return equal(given, expected), len(decoded), by_itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good samples of all kinds, and captions of which a tenth is bad in some way, in the pixels too."""
    folder = write_all(tmp_path_factory.mktemp("data"))
    write_mixed(folder / "bad", count=60, shards=2)
    return folder


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in LAYOUTS],
)
def test_each_image_is_decoded_once_in_its_group(pool, tmp_path, folder, name):
    ranks, layout = LAYOUTS[name]
    results = pool.run(ranks, read_both_ways, folder, tmp_path, layout)
    sharers = ranks // degrees(job_of(folder, tmp_path, layout).parallelism, ranks).dp
    assert all(same for same, _, _ in results)
    once, by_themselves = (sum(result[i] for result in results) for i in (1, 2))
    assert once * sharers == by_themselves > 0
    assert sum(decoded > 0 for _, decoded, _ in results) == ranks // sharers


def rejects_of(dump: Path) -> Counter:
    lines = [line for path in (dump / "rejects").glob("*.jsonl") for line in path.read_text().splitlines()]
    return Counter(lines)


def read_all(folder: Path, dump: Path) -> list[int]:
    job = job_of(folder, dump, {"tensor_parallel_degree": 2}, epochs=1)
    job.data.sources = job.data.sources[-1:]
    mesh = build_mesh(degrees(job.parallelism, dist.get_world_size()), CPU)
    place = {"rank": mesh.data.get_local_rank(), "ranks": mesh.data.size(), "agree": agree_on_data}
    loader = Loader(job, Characters(), group=slot_group(mesh), **place)
    steps = [len(step.batches) for step in loader]
    loader.close()
    return steps


def test_data_end_on_all_ranks_and_rejects_are_written_once(pool, tmp_path, folder):
    first, second = pool.run(2, read_all, folder, tmp_path)
    assert first == second and set(first) == {2}
    assert set(rejects_of(tmp_path).values()) == {1}


def failing(folder: Path, dump: Path) -> str:
    job = job_of(folder, dump, {"tensor_parallel_degree": 2})
    job.data.sources = [Source(name="broken", format="cc12m", path=str(folder / "broken.tar"))]
    mesh = build_mesh(degrees(job.parallelism, dist.get_world_size()), CPU)
    place = {"rank": 0, "ranks": 1, "agree": agree_on_data, "group": slot_group(mesh)}
    try:
        Loader(job, Characters(), **place)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_what_the_rank_that_reads_complains_of_ends_all_of_them(pool, tmp_path):
    (tmp_path / "broken.tar").write_bytes(b"no tar")
    first, second = pool.run(2, failing, tmp_path, tmp_path / "out")
    assert first == second and first.startswith("DataError: source broken")
