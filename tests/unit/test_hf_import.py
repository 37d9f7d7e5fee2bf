"""Folders that transformers saved, read into our model: the same outputs, and what is not taken is told."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.model.vlm import VLM
from experiments.vlm.spec import build_vlm
from experiments.vlm.weights.initial_weights import initial_weights
from tests.reference.batches import build_batch, draw_pictures, example_slots
from tests.reference.hf_folders import decoder_model, fixed_model, naflex_model, save, state_of, whole_model
from tests.reference.models import LLAMA, QWEN2, QWEN3, VOCAB
from tests.unit.test_vit import ROWS, pack, raster
from tests.unit.test_vlm import inputs_alone, sizes_of
from torchtitan.components.weights import fill, shapes_of, to_empty
from torchtitan.config.errors import ConfigError
from torchtitan.layers.masks import Mask

MISTRAL = dataclasses.replace(LLAMA, rope_scaling=None, window=4096, model_type="mistral")
DECODERS = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "mistral": MISTRAL}


class Rows:
    """A tokenizer with so many ids."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


def job_of(**folders: Path | str) -> VLMJobConfig:
    """Keys: path, encoder_path, decoder_path."""
    job = VLMJobConfig()
    job.checkpoint.initial_load_in_hf = True
    for name, folder in folders.items():
        setattr(job.checkpoint, f"initial_load_{name}", str(folder))
    return job


def load(job: VLMJobConfig, ids: int | None = None) -> VLM:
    """On one process, without FSDP."""
    model = build_vlm(job, Rows(ids) if ids else None)
    source = initial_weights(job, shapes_of(model))
    to_empty([model], "cpu")
    fill([model], model.tied_names(), 0, source)
    return model.eval()


def report(job: VLMJobConfig) -> str:
    source = initial_weights(job, shapes_of(build_vlm(job, None)))
    assert source is not None
    return "\n".join(source.report())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind."""
    at = tmp_path_factory.mktemp("hf")
    made = {name: save(decoder_model(config), at / name) for name, config in DECODERS.items()}
    made |= {
        "naflex": save(naflex_model(head=True), at / "naflex"),
        "fixed": save(fixed_model(), at / "fixed"),
    }
    return made | {"whole": save(whole_model(), at / "whole")}


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_decoder_computes_what_transformers_does(folders, name):
    from transformers import AutoModelForCausalLM

    ours = load(job_of(encoder_path=folders["naflex"], decoder_path=folders[name])).decoder
    theirs = AutoModelForCausalLM.from_pretrained(folders[name], dtype="float32").eval()
    tokens = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    places = torch.arange(40).expand(2, -1)
    assert ours.tok_embeddings is not None
    mask = Mask(segments=torch.zeros_like(tokens, dtype=torch.int32), causal=True)
    found = ours(ours.tok_embeddings(tokens), places, mask)
    assert (found - theirs(tokens).logits).abs().max() < 1e-3


@pytest.mark.parametrize("merge", [1, 2])
@torch.no_grad()
def test_a_naflex_tower_computes_what_transformers_does_on_images_of_many_sizes(folders, merge):
    from transformers import Siglip2VisionModel

    from tests.reference.batches import pad_for_transformers

    ours = load(job_of(encoder_path=folders["naflex"], decoder_path=folders["qwen3"])).encoder
    theirs = Siglip2VisionModel.from_pretrained(folders["naflex"], dtype="float32").eval()
    rows = draw_pictures(ROWS[merge])
    assert ours is not None
    found = raster(ours(*pack(rows, merge)), rows, merge)
    pictures = [picture for row in rows for picture in row]
    for picture, features in zip(pictures, found, strict=True):
        alone = pad_for_transformers([picture])
        expected = theirs(
            pixel_values=alone["pixel_values"],
            pixel_attention_mask=alone["pixel_attention_mask"],
            spatial_shapes=alone["spatial_shapes"],
        ).last_hidden_state[0]
        assert (features - expected[: len(features)]).abs().max() < 1e-3


@torch.no_grad()
def test_a_tower_of_one_image_size_computes_what_transformers_does(folders):
    from einops import rearrange
    from transformers import SiglipVisionModel

    ours = load(job_of(encoder_path=folders["fixed"], decoder_path=folders["qwen3"])).encoder
    theirs = SiglipVisionModel.from_pretrained(folders["fixed"], dtype="float32").eval()
    image = torch.randint(0, 256, (1, 3, 34, 34), generator=torch.Generator().manual_seed(2))
    patches = rearrange(image[..., :32, :32], "1 c (h p) (w q) -> 1 (h w) (p q c)", p=4, q=4).to(torch.uint8)
    grid = torch.tensor([[[0, h, w] for h in range(8) for w in range(8)]], dtype=torch.int32)
    assert ours is not None
    expected = theirs(image / 127.5 - 1).last_hidden_state
    assert (ours(patches, grid) - expected).abs().max() < 1e-3


@torch.no_grad()
def test_a_whole_model_computes_what_transformers_does(folders):
    from transformers import Lfm2VlForConditionalGeneration

    ours = load(job_of(path=folders["whole"]))
    theirs = Lfm2VlForConditionalGeneration.from_pretrained(folders["whole"], dtype="float32").eval()
    assert_packed_equals_alone(ours, theirs)


def assert_packed_equals_alone(ours, theirs) -> None:
    """Our logits of packed documents are those of transformers for each of them."""
    slots, batch = example_slots(2), build_batch(example_slots(2), sizes_of(2))
    del batch["labels"]
    logits = ours(**batch)
    for row, documents in enumerate(slots):
        for number, document in enumerate(documents):
            here = batch["document_ids"][row] == number
            assert (logits[row, here] - theirs(**inputs_alone(document, 2)).logits[0]).abs().max() < 1e-3


def test_parts_come_from_folders_of_their_own_and_the_projector_is_fresh(folders):
    job = job_of(encoder_path=folders["naflex"], decoder_path=folders["qwen3"])
    model, lines = load(job), report(job)
    assert model.config.projector.hidden_dim == QWEN3.dim
    kernel = state_of(folders["naflex"])["embeddings.patch_embedding.weight"]
    assert model.encoder is not None and torch.equal(model.encoder.embedding.projection.weight, kernel)
    assert torch.equal(model.decoder.output.weight, state_of(folders["qwen3"])["lm_head.weight"])
    fresh = build_vlm(job, None)
    to_empty([fresh], "cpu")
    fill([fresh], fresh.tied_names(), 0)
    assert torch.equal(fresh.projector.linear_1.weight, model.projector.linear_1.weight)
    assert "projector: fresh" in lines
    bytes_ = sum(4 * tensor.numel() for tensor in state_of(folders["qwen3"]).values())
    count = len(state_of(folders["qwen3"]))
    assert f"decoder from {folders['qwen3']}: {count} tensors, {bytes_:,} bytes of float32" in lines
    assert "11 tensors, of the pooling head: a VLM reads the patches" in lines


def test_a_part_of_a_whole_model_is_taken_and_the_rest_is_named(folders):
    job = job_of(path=folders["whole"], decoder_path=folders["qwen3"])
    lines = report(job)
    assert f"encoder from {folders['whole']}" in lines and f"projector from {folders['whole']}" in lines
    assert f"decoder from {folders['qwen3']}" in lines
    assert "of its decoder, which is not taken from it" in lines
    with pytest.raises(ConfigError, match="nothing of it is used"):
        report(job_of(path=folders["qwen3"], decoder_path=folders["qwen2"], encoder_path=folders["naflex"]))
    with pytest.raises(ConfigError, match="nothing says which encoder"):
        report(job_of(decoder_path=folders["qwen2"]))
    with pytest.raises(ConfigError, match="holds the decoder alone"):
        report(job_of(encoder_path=folders["qwen2"]))


def test_a_flavor_gives_the_sizes_of_parts_without_a_folder_and_must_agree_with_the_others(folders):
    job = job_of(decoder_path=folders["qwen3"])
    job.model.flavor = "debugmodel"
    with pytest.raises(ConfigError, match="model.flavor = debugmodel: dim is 128, but 64 in .*config.json"):
        report(job)


def test_new_rows_of_a_larger_vocabulary_are_the_mean_of_the_old_ones(folders):
    for name in ("qwen2", "qwen3"):  # tied, and with an output layer of its own
        model = load(job_of(encoder_path=folders["naflex"], decoder_path=folders[name]), ids=VOCAB + 5)
        state = state_of(folders[name])
        table, output = model.decoder.tok_embeddings.weight, model.decoder.output.weight
        for ours, theirs in ((table, "model.embed_tokens.weight"), (output, "lm_head.weight")):
            old = state.get(theirs, state["model.embed_tokens.weight"])
            assert torch.equal(ours[:VOCAB], old)
            mean = old.double().mean(0).float()
            assert torch.allclose(ours[VOCAB:], mean.expand(5, -1), rtol=0, atol=1e-7)


def test_rows_beyond_the_tokenizers_ids_are_kept(folders):
    model = load(job_of(encoder_path=folders["naflex"], decoder_path=folders["qwen3"]), ids=VOCAB - 7)
    assert torch.equal(model.decoder.output.weight, state_of(folders["qwen3"])["lm_head.weight"])


@pytest.mark.parametrize("indexed", [True, False])
def test_a_folder_of_several_files_is_read_with_and_without_its_index(folders, tmp_path, indexed):
    folder = save(decoder_model(QWEN3), tmp_path / "several", max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    if not indexed:
        (folder / "model.safetensors.index.json").unlink()
    one = load(job_of(encoder_path=folders["naflex"], decoder_path=folders["qwen3"]))
    several = load(job_of(encoder_path=folders["naflex"], decoder_path=folder))
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, several.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_read_exactly(folders, tmp_path, dtype):
    folder = save(decoder_model(LLAMA), tmp_path / "half", dtype)
    job = job_of(encoder_path=folders["naflex"], decoder_path=folder)
    assert torch.equal(load(job).decoder.output.weight, state_of(folder)["lm_head.weight"].float())
    assert f"bytes of {str(dtype).removeprefix('torch.')}" in report(job)


def test_older_spellings_and_the_decoder_without_its_head_are_read(folders, tmp_path):
    from safetensors.torch import save_file

    older = tmp_path / "older"
    shutil.copytree(folders["whole"], older)
    state = state_of(older)
    state = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in state.items()}
    state["model.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(state, older / "model.safetensors")
    one, other = load(job_of(path=folders["whole"])), load(job_of(path=older))
    assert all(torch.equal(w, other.state_dict()[n]) for n, w in one.state_dict().items())
    assert "1 tensors, position_ids, which are computed" in report(job_of(path=older))


def test_a_tied_table_that_is_stored_twice_must_be_equal(folders, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "tied"
    shutil.copytree(folders["qwen2"], folder)
    state = state_of(folder)
    save_file(
        state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, folder / "model.safetensors"
    )
    job = job_of(encoder_path=folders["naflex"], decoder_path=folder)
    load(job)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"tensor lm_head.weight in .* is not model.embed_tokens.weight"):
        report(job)


def test_the_model_follows_the_folder_and_options_that_contradict_it_are_told(folders, tmp_path):
    job = job_of(path=save(whole_model(merge=3), tmp_path / "merge3"))
    assert load(job).projector.merged == 9
    job.data.spatial_merge_size = 2
    with pytest.raises(ConfigError, match="data.spatial_merge_size = 2: the model merges 3 x 3 patches"):
        report(job)
    job.data.spatial_merge_size, job.data.patch_size = 3, 16
    with pytest.raises(ConfigError, match="data.patch_size = 16: the model takes patches of 4"):
        report(job)
    fresh = job_of(encoder_path=folders["naflex"], decoder_path=folders["llama"])
    fresh.data.spatial_merge_size = 3  # its projector is new, so it may merge as it is told
    assert load(fresh).projector.merged == 9
