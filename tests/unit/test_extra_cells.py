"""Class token and registers in cells of their own behind the patches of their image: in the model, and from
images to the batch.
"""

import dataclasses
from typing import Any

import pytest
import torch
from einops import rearrange

from experiments.vlm.check import check_patches
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.data.image import ImagePlan
from experiments.vlm.data.packing import Budget
from experiments.vlm.generate.prompt import Picture as PromptPicture
from experiments.vlm.generate.prompt import Prompter
from experiments.vlm.model.config import ProjectorConfig, VLMConfig
from experiments.vlm.model.flavors import ENCODERS
from experiments.vlm.model.vlm import VLM
from tests.reference.batches import Picture, Sizes, build_batch, draw_picture, words
from tests.reference.models import QWEN3, randomise
from tests.samples import encoded
from tests.tiny_data import Characters
from tests.unit.test_towers import image_of, ours_of, theirs_and_config
from torchtitan.components.lora import adapt
from torchtitan.config.errors import ConfigError
from torchtitan.config.job import LoRA


def small(name: str, merge: int) -> tuple[VLM, Sizes]:
    """A whole model with a tower of that kind."""
    _, config = theirs_and_config(name)
    model = VLM(VLMConfig(config, ProjectorConfig(56, merge_size=merge), QWEN3), QWEN3.vocab_size, "sdpa", 16)
    randomise(model)
    return model, Sizes(seq_len=64, patches_per_row=144, merge=merge, extra=config.extra_cells)


def documents(merge: int) -> list[list[Any]]:
    pictures = [draw_picture(2 * merge, 3 * merge, 4, 0), draw_picture(merge, 2 * merge, 4, 1)]
    return [
        [words(3, 0), pictures[0], words(4, 1), pictures[1], words(2, 2)],
        [words(5, 3), draw_picture(3 * merge, merge, 4, 2), words(3, 4)],
        [words(6, 5)],
    ]


@pytest.mark.parametrize("name", ["clip", "dinov3"])
@pytest.mark.parametrize("merge", [1, 2])
@torch.no_grad()
def test_documents_beside_each_other_compute_what_each_does_alone(name, merge):
    model, sizes = small(name, merge)
    together = build_batch([documents(merge)], sizes)
    del together["labels"]
    logits, start = model(**together)[0], 0
    for document in documents(merge):
        alone = build_batch([[document]], sizes)
        del alone["labels"]
        length = int((alone["document_ids"][0] >= 0).sum())
        assert (model(**alone)[0, :length] - logits[start : start + length]).abs().max() < 1e-4
        start += length


@pytest.mark.parametrize("name", ["clip", "dinov3"])
def test_cells_beside_class_token_and_registers_carry_nothing_and_merge_with_nothing(name):
    """Not the pixels of such a cell, nor those of the extra cells, reach anything; one image no other."""
    model, sizes = small(name, 2)
    batch = build_batch([documents(2)], sizes)
    grid = batch["grid_thw"][0]
    assert ((grid[:, 1] == -2).sum(), (grid[:, 1] >= 0).sum()) == (3 * sizes.extra, 24 + 8 + 12)
    loss = model(**batch)
    loss.sum().backward()
    before = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    spoilt = batch | {"pixel_values": batch["pixel_values"].clone()}
    spoilt["pixel_values"][0, grid[:, 1] < 0] = 177
    again = model(**spoilt)
    again.sum().backward()
    assert torch.equal(loss, again)
    for key, parameter in model.named_parameters():
        assert (before[key] is None) == (parameter.grad is None), key
        assert before[key] is None or torch.equal(before[key], parameter.grad), key
    features = model.encoder(batch["pixel_values"], batch["grid_thw"])[0]
    assert torch.equal(features[grid[:, 1] < 0], torch.zeros_like(features[grid[:, 1] < 0]))
    other = batch["pixel_values"].clone()
    other[0, :24] = 255 - other[0, :24]
    changed = model.encoder(other, batch["grid_thw"])[0]
    assert not torch.equal(changed[:24], features[:24]) and torch.equal(changed[24:], features[24:])


def test_an_image_and_its_extra_cells_fit_a_row():
    job = VLMJobConfig()
    job.training.seq_len, job.data.patches_per_row, job.data.max_patches_per_image = 512, 1024, 1024
    config = VLMConfig(ENCODERS["dinov3-S"], ProjectorConfig(64), QWEN3)
    with pytest.raises(ConfigError, match="1024 and 8 cells .* more than a row holds .* = 1024"):
        check_patches(job, config)
    job.data.patches_per_row = 1032
    check_patches(job, config)
    kept = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, feature_extra=True))
    with pytest.raises(ConfigError, match="data.spatial_merge_size must be 1"):
        check_patches(job, kept)


@torch.no_grad()
def test_a_class_token_that_is_kept_is_the_first_visual_token_of_its_image():
    """As transformers orders it: the loader's indices, and what the encoder gives for them."""
    theirs, config = theirs_and_config("dinov3")
    ours = ours_of(theirs, config, feature_extra=True)
    plan = ImagePlan(4, 1, 1, 64, "native", config.extra_cells, extra_tokens=True)
    pictures = [draw_picture(3, 5, 4, 0), draw_picture(4, 2, 4, 1)]
    prompter = Prompter(Characters(), plan, Budget(64, 1, 64), 64)
    prompt = prompter.beginning([PromptPicture(png(picture)) for picture in pictures])
    features = ours(torch.from_numpy(prompt.pixel_values), torch.from_numpy(prompt.grid_thw))[0]
    placed = features[prompt.visual_index[prompt.visual_index >= 0]]
    expected = [theirs(image_of(picture, config)).last_hidden_state[0] for picture in pictures]
    assert [len(state) for state in expected] == [5 + 15, 5 + 8]
    assert (placed - torch.cat(expected)).abs().max() < 1e-4


def png(picture: Picture) -> bytes:
    return encoded(rearrange(picture.patches, "h w (p q c) -> (h p) (w q) c", p=4, q=4).numpy(), "PNG")


def test_what_lies_behind_the_feature_gets_no_adapters():
    model, _ = small("clip", 2)
    adapt(model, LoRA(rank=2, patterns=["encoder"]))
    layers = {name.split(".")[2] for name, _ in model.named_parameters() if "lora" in name}
    assert layers & {"0", "1", "2"} == {"0", "1"} and model.encoder.depth == 2
    with pytest.raises(ConfigError, match="no linear map is called so"):
        adapt(small("clip", 2)[0], LoRA(rank=2, patterns=[r"encoder\.layers\.2"]))
