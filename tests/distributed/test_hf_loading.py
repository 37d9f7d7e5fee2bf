"""Folders read on several ranks: the weights of one process bit for bit, and each rank within its shard."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from tests.distributed.layouts import Layout
from tests.distributed.table import layout
from tests.reference.hf_folders import save, state_of
from tests.reference.models import hf_text_config, hf_vision_config
from tests.reference.small_run import CPU, DECODERS, ENCODER, SMALL, VOCAB, job_of, whole
from torchtitan.build import build
from torchtitan.components.checkpoint_read import stored_tensors
from torchtitan.components.weights import named_weights
from torchtitan.config.layout import degrees
from torchtitan.distributed.mesh import build_mesh
from torchtitan.loaded_model import open_model
from torchtitan.train import Trainer

MANY = 2**18  # rows, whose tables are most of the model
LAYOUTS = [
    layout("fsdp2.tp2", 4, tp=2),
    layout("fsdp2.pp2", 4, pp=2),
    layout("fsdp2.tp2, encoder heads", 4, tp=2, heads=True),
    layout("fsdp2.pp2, ZBVZeroBubble", 4, pp=2, schedule="ZBVZeroBubble"),
]


def save_whole(folder: Path, decoder: str, **sizes: int) -> Path:
    """A whole model of the sizes of small runs, or with others of its decoder."""
    from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

    text = hf_text_config(DECODERS[decoder]).to_dict() | sizes
    values = Lfm2VlConfig(
        text_config=text,
        vision_config=hf_vision_config(ENCODER),
        projector_hidden_size=48,
        tie_word_embeddings=DECODERS[decoder].tied_embeddings,
    )
    return save(Lfm2VlForConditionalGeneration(values), folder, torch.bfloat16, max_shard_size="100KB")


def options(case: Layout, folder: Path) -> dict:
    others = {"model.flavor": "", "checkpoint.initial_load_in_hf": True}
    return case.changes | others | {"checkpoint.initial_load_path": str(folder)}


def memory() -> int:
    """The most bytes that this process held since the last call."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    Path("/proc/self/clear_refs").write_text("5")
    assert found is not None
    return int(found[1]) * 1024


def load(case: Layout, folder: Path, ids: int) -> tuple[dict[str, torch.Tensor], int, int]:
    """The weights of this rank's parts, whole; bytes of its shards, and by how many its memory rose."""
    job = job_of(options(case, folder), "")
    mesh = build_mesh(degrees(job.parallelism, dist.get_world_size()), CPU)
    tokenizer = SMALL.load_tokenizer(job)
    tokenizer.vocab_size = ids
    memory()
    before = memory()
    opened = open_model(job, SMALL, mesh, tokenizer, None)
    rose = memory() - before
    weights = named_weights(opened.parts, opened.parts[0].tied_names())
    shards = sum(4 * (w.to_local() if isinstance(w, DTensor) else w).numel() for w in weights.values())
    return {name: whole(weight) for name, weight in weights.items() if ids < MANY}, shards, rose


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    at = tmp_path_factory.mktemp("hf")
    return {name: save_whole(at / name, name) for name in ("llama", "qwen3-tied")}


QUICK = [(LAYOUTS[0], "qwen3-tied")]
FURTHER = [(case, name) for case in LAYOUTS for name in ("llama", "qwen3-tied") if (case, name) not in QUICK]


@pytest.mark.parametrize(
    "case, decoder",
    [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in FURTHER)],
    ids=lambda each: each if isinstance(each, str) else each.name,
)
def test_loading_on_four_ranks_gives_the_weights_of_one_process(pool, folders, case, decoder):
    """In a vocabulary that has grown; and those are the ones in the file."""
    ((one, _, _),) = pool.run(1, load, layout("one", 1), folders[decoder], VOCAB + 64)
    table = state_of(folders[decoder])["model.language_model.embed_tokens.weight"].float()
    assert torch.equal(one["decoder.tok_embeddings.weight"][:VOCAB], table)
    found = pool.run(4, load, case, folders[decoder], VOCAB + 64)
    assert set().union(*(weights for weights, _, _ in found)) == one.keys()
    for weights, _, _ in found:
        for name, weight in weights.items():
            assert torch.equal(weight, one[name]), name


@pytest.mark.slow
def test_a_rank_holds_no_more_than_its_shard_and_the_largest_tensor(pool, tmp_path):
    folder = save_whole(tmp_path / "large", "llama", vocab_size=MANY)
    largest = 4 * MANY * DECODERS["llama"].dim
    for case in (LAYOUTS[0], LAYOUTS[1], layout("fsdp4", 4)):
        for rank, (_, shards, rose) in enumerate(pool.run(4, load, case, folder, MANY)):
            print(f"{case.name} rank {rank}: shards {shards / 2**20:.0f} MiB, rose by {rose / 2**20:.0f} MiB")
            assert rose < shards + largest, case.name


def train_and_save(folder: str, hf: str, ids: int) -> None:
    """A run of a few steps whose last checkpoint is a Hugging Face folder too."""
    more = {"checkpoint.enable": True, "checkpoint.last_save_in_hf": True, "training.steps": 3}
    job = job_of(options(layout("fsdp2", 2), Path(hf)) | more, folder)
    trainer = Trainer(build(job, SMALL, CPU))
    trainer.train()
    trainer.close()


def test_a_run_ends_with_a_folder_that_holds_its_last_weights(pool, folders, tmp_path):
    pool.run(2, train_and_save, str(tmp_path), str(folders["qwen3-tied"]), VOCAB)
    saved = state_of(tmp_path / "hf" / "step-3")
    stored = {
        name: torch.empty(tensor.shape)
        for name, tensor in stored_tensors(tmp_path / "checkpoint" / "step-3").items()
        if name.startswith("model.")
    }
    dcp.load(stored, checkpoint_id=str(tmp_path / "checkpoint" / "step-3"), no_dist=True)
    assert len(saved) == len(stored)
    for ours, theirs in (
        ("tok_embeddings", "embed_tokens"),
        ("layers.3.attention.wq", "layers.3.self_attn.q_proj"),
    ):
        weight = saved[f"model.language_model.{theirs}.weight"]
        assert torch.equal(stored[f"model.decoder.{ours}.weight"], weight)
    before = state_of(folders["qwen3-tied"])["model.language_model.embed_tokens.weight"].float()
    assert not torch.equal(before, saved["model.language_model.embed_tokens.weight"])
    assert (tmp_path / "hf" / "step-3" / "processor_config.json").is_file()
