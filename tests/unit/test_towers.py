"""Towers of other families against transformers at the same random weights: every layer, mixed sizes packed
into rows with their class tokens and registers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.model.config import EncoderConfig, ProjectorConfig, VLMConfig
from experiments.vlm.model.families.lfm2_vl import require_lfm2_vl
from experiments.vlm.model.flavors import ENCODERS
from experiments.vlm.model.patch_embedding import normalised
from experiments.vlm.model.towers import TOWERS, dinov3, read_encoder, tower_of, write_encoder
from experiments.vlm.model.vit import VisionEncoder
from experiments.vlm.processor import processor_config
from tests.reference.batches import Picture, Sizes, draw_pictures, merge_order, pack_pictures
from tests.reference.hf_folders import (
    aimv2_model,
    clip_model,
    decoder_model,
    dinov3_model,
    fixed_model,
    save,
    state_of,
)
from tests.reference.models import QWEN3, randomise
from tests.unit.test_flavors import ENCODER_PARAMETERS
from tests.unit.test_hf_import import job_of, load, report
from torchtitan.config.errors import ConfigError
from torchtitan.models.decoder.flavors import DECODERS
from torchtitan.models.hf.config_file import ConfigFile
from torchtitan.models.hf.folder import read_tensors
from torchtitan.models.hf.tensors import Rows
from torchtitan.models.weight_names import read, write

MIXED, SQUARE = [[(6, 4), (2, 12), (8, 8)], [(10, 2), (4, 4)]], [[(8, 8), (8, 8)], [(8, 8)]]


class Pair(NamedTuple):
    """A tower of theirs, and the sizes of images that its class takes."""

    make: Callable[[], nn.Module]
    rows: list[list[tuple[int, int]]] = MIXED


PAIRS = {
    "siglip": Pair(fixed_model, SQUARE),
    "clip": Pair(clip_model, SQUARE),
    "aimv2": Pair(aimv2_model),
    "aimv2, one size": Pair(lambda: aimv2_model(native=False), SQUARE),
    "aimv2, biases": Pair(lambda: aimv2_model(qkv_bias=True, mlp_bias=True, hidden_act="gelu")),
    "dinov3": Pair(dinov3_model),
    "dinov3, gated": Pair(lambda: dinov3_model(use_gated_mlp=True, hidden_act="silu", key_bias=True)),
    "dinov3, no registers": Pair(lambda: dinov3_model(num_register_tokens=0, mlp_bias=False)),
}


def theirs_and_config(name: str) -> tuple[Any, EncoderConfig]:
    theirs = PAIRS[name].make().float().eval()
    randomise(theirs)
    return theirs, read_encoder(ConfigFile(theirs.config.to_dict(), "theirs"))


def ours_of(theirs: nn.Module, config: EncoderConfig, **feature) -> VisionEncoder:
    ours = VisionEncoder(dataclasses.replace(config, **feature), "sdpa")
    found = read(theirs.state_dict(), tower_of(config).rows(config))
    assert [name for name in found.unused if name not in tower_of(config).left_over] == []
    ours.load_state_dict(found.named)
    return ours


def pack(rows: list[list[Picture]], config: EncoderConfig) -> tuple[Tensor, Tensor]:
    """With some padding at the end of every row."""
    return pack_pictures(rows, Sizes(seq_len=256, patches_per_row=180, extra=config.extra_cells))


def taken_apart(features: Tensor, rows: list[list[Picture]], extra: int) -> list[Tensor]:
    """Packed [N, L, D] -> per image [extra + h * w, D] in the order of transformers, at merge 2."""
    result = []
    for row, pictures in enumerate(rows):
        start = 0
        for picture in pictures:
            (h, w), end = picture.size, start + picture.size[0] * picture.size[1]
            order = torch.tensor([i * w + j for i, j in merge_order(h, w, 2)])
            patches = features[row, start:end][order.argsort()]
            result.append(torch.cat([features[row, end : end + extra], patches]))
            start = end + -(-extra // 4) * 4
    return result


def normalised_image(picture: Picture, config: EncoderConfig) -> Tensor:
    """[1, 3, H, W]."""
    image = rearrange(picture.patches, "h w (p q c) -> 1 c (h p) (w q)", p=4, q=4).float() / 255
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.deviation))
    return (image - mean) / deviation


def image_of(picture: Picture, config: EncoderConfig) -> Tensor:
    """As their class takes it, [1, 3, H, W]; where it leaves a rest, with that."""
    edge = 2 if config.image_size and picture.size == (8, 8) else 0  # 34 pixels: two are not read
    return F.pad(normalised_image(picture, config), (0, edge, 0, edge), value=9.0)


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_every_layer_equals_transformers_class_token_and_registers_too(name):
    theirs, config = theirs_and_config(name)
    rows, depths = draw_pictures(PAIRS[name].rows), tuple(range(config.layers + 1))
    ours = ours_of(theirs, config, feature_layers=depths, feature_norm=False, feature_extra=True)
    normed = ours_of(theirs, config, feature_layers=(-1,), feature_norm=True, feature_extra=True)
    batch = pack(rows, config)
    found = taken_apart(ours(*batch), rows, config.extra_cells)
    last = taken_apart(normed(*batch), rows, config.extra_cells)
    for number, picture in enumerate(picture for row in rows for picture in row):
        expected = theirs(image_of(picture, config), output_hidden_states=True)
        for state, feature in zip(expected.hidden_states, found[number].chunk(len(depths), -1), strict=True):
            assert (feature - state[0]).abs().max() < 1e-4
        if config.model_type != "clip_vision_model":
            assert (last[number] - expected.last_hidden_state[0]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["clip", "siglip", "aimv2", "dinov3, gated"])
def test_gradients_equal_transformers(name):
    theirs, config = theirs_and_config(name)
    ours = ours_of(theirs, config)
    rows = draw_pictures(PAIRS[name].rows)
    found = taken_apart(ours(*pack(rows, config)), rows, config.extra_cells)
    total, expected_total = torch.zeros(()), torch.zeros(())
    for number, picture in enumerate(picture for row in rows for picture in row):
        out = theirs(image_of(picture, config), output_hidden_states=True)
        state = out.last_hidden_state if config.feature_norm else out.hidden_states[config.feature_layers[0]]
        patches = state[0, config.extra_cells :]
        assert torch.equal(found[number][: config.extra_cells], torch.zeros(config.extra_cells, config.dim))
        weights = torch.randn(patches.shape, generator=torch.Generator().manual_seed(number))
        total = total + (found[number][config.extra_cells :] * weights).sum()
        expected_total = expected_total + (patches * weights).sum()
    total.backward()
    expected_total.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in ours.named_parameters()}
    named = write(gradients, tower_of(config).rows(config))
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters() if p.grad is not None)
    for key, parameter in theirs.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        # The true gradient of a key's bias is 0: compare it with the others, not with its own noise.
        scale = max(float(expected.abs().max()), 1e-3 * largest)
        key = key.removeprefix("model.")  # of dinov3, in memory
        assert (named[key] - expected).abs().max() < 1e-4 * scale, key


@torch.no_grad()
def test_learned_positions_of_clip_are_resized_to_each_image_and_the_class_keeps_its_own():
    """Their layers on what a convolution and PyTorch's own interpolation make of an image of any size."""
    theirs, config = theirs_and_config("clip")
    ours = ours_of(theirs, config, feature_extra=True)
    rows = draw_pictures(MIXED)
    found = taken_apart(ours(*pack(rows, config)), rows, 1)
    table = theirs.embeddings.position_embedding.weight
    for number, picture in enumerate(picture for row in rows for picture in row):
        square = rearrange(table[1:], "(h w) d -> 1 d h w", h=8)
        places = F.interpolate(square, picture.size, mode="bilinear", antialias=True)
        places = torch.cat([table[:1], rearrange(places, "1 d h w -> (h w) d")])
        image = normalised_image(picture, config)
        patches = theirs.embeddings.patch_embedding(image).flatten(2).transpose(1, 2)
        x = torch.cat([theirs.embeddings.class_embedding[None, None], patches], 1) + places
        x = theirs.pre_layrnorm(x)
        for layer in theirs.encoder.layers[:-1]:
            x = layer(x, None)
        assert (found[number] - x[0]).abs().max() < 1e-4, picture.size


@pytest.mark.parametrize("name", PAIRS)
def test_sizes_are_read_as_they_are_written(name):
    from transformers import AutoConfig

    theirs, config = theirs_and_config(name)
    written = write_encoder(config)
    assert read_encoder(ConfigFile(written, "written")) == config
    again = AutoConfig.for_model(**written).to_dict()
    left = ("architectures", "image_size") if config.image_size is None else ("architectures",)
    expected = {key: value for key, value in theirs.config.to_dict().items() if key not in left}
    assert {key: value for key, value in again.items() if key not in left} == expected


@pytest.mark.parametrize("kind", TOWERS)
def test_a_sparse_file_means_the_defaults_of_its_class(kind):
    from transformers import AutoConfig

    sparse = read_encoder(ConfigFile({"model_type": kind, "layer_norm_eps": None}, "sparse"))
    assert sparse == read_encoder(ConfigFile(AutoConfig.for_model(kind).to_dict(), "theirs"))


# What their files say, and leave to the defaults of the class.
PUBLISHED: dict[str, dict[str, Any]] = {
    "clip-L": {
        "model_type": "clip",
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
    },
    "siglip-so400m": {
        "model_type": "siglip",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
    },
    "aimv2-L": {"model_type": "aimv2_vision_model", "is_native": True},
    "dinov3-S": {"model_type": "dinov3_vit", "num_register_tokens": 4, "rope_scaling": None},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_sparse_published_file_gives_the_sizes_of_the_flavor(name):
    assert read_encoder(ConfigFile(PUBLISHED[name], "published")) == ENCODERS[name]


@pytest.mark.parametrize("name", [name for name in ENCODERS if "-" in name])
def test_a_tower_of_published_size_has_a_place_for_every_tensor(name):
    from transformers import AutoModel

    config = ENCODERS[name]
    with torch.device("meta"):
        ours = VisionEncoder(config, "sdpa")
        theirs = AutoModel.from_config(hf_config(config))
    found = read(theirs.state_dict(), tower_of(config).rows(config))
    assert not found.unused
    shapes = {key: tensor.shape for key, tensor in found.named.items()}
    assert shapes == {key: parameter.shape for key, parameter in ours.named_parameters()}
    assert sum(parameter.numel() for parameter in theirs.parameters()) == ENCODER_PARAMETERS[name]


def hf_config(config: EncoderConfig) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**write_encoder(config))


@torch.no_grad()
def test_features_of_several_layers_lie_side_by_side_and_what_lies_behind_does_not_run():
    theirs, config = theirs_and_config("dinov3")
    rows = draw_pictures(MIXED)
    ours = ours_of(theirs, config, feature_layers=(2, -4), feature_norm=True)
    each = [ours_of(theirs, config, feature_layers=(depth,)) for depth in (2, 0)]
    batch = pack(rows, config)
    assert ours.config.feature_dim == 96 and ours.running() == ["embedding", "layers.0", "layers.1", "norm"]
    assert torch.equal(ours(*batch), torch.cat([one(*batch) for one in each], -1))
    behind = [parameter for key, parameter in ours.named_parameters() if key.startswith("layers.2.")]
    assert behind and not any(parameter.requires_grad for parameter in behind)
    for parameter in behind:
        parameter.fill_(float("nan"))
    assert ours(*batch).isfinite().all()


def test_pixels_are_normalised_by_colour():
    config = ENCODERS["clip-L"]
    pixels = torch.randint(0, 256, (2, 5, 12), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = normalised(pixels, config)
    for place in range(12):
        mean, deviation = config.mean[place % 3], config.deviation[place % 3]
        expected = (pixels[..., place].double() / 255 - mean) / deviation
        assert (found[..., place] - expected).abs().max() < 1e-5
    assert torch.equal(normalised(pixels, ENCODERS["base"]), pixels.float() / 127.5 - 1.0)


def test_a_rank_takes_its_rows_of_a_weight_that_is_changed_as_a_whole(tmp_path):
    """[1, R, D] there, [R, D] here, whose rows two to four lie on this rank."""
    folder = save(dinov3_model(), tmp_path / "dinov3")
    stored = read_tensors(folder)["embeddings.register_tokens"]
    (row,) = [row for row in dinov3.rows(ENCODERS["dinov3-S"]) if row.theirs == stored.name]
    rows = Rows(stored, range(1), row.transform.read, row.transform.whole)
    (part,) = rows.read(2, 4)
    assert (len(rows), rows.shape) == (4, (4, 48))
    assert torch.equal(part, state_of(folder)[stored.name][0, 2:4])


def test_a_model_that_no_class_holds_is_exported_by_its_parts_alone():
    job = VLMJobConfig()
    for flavor in ("clip-L-qwen3-0.6B", "dinov3-S-llama3.2-1B"):
        job.model.flavor = flavor
        with pytest.raises(ConfigError, match="no class of transformers has a .* export its parts alone"):
            processor_config(job)
    sizes = ProjectorConfig(2048, layer_norm=False, merge_size=3)
    plain = VLMConfig(ENCODERS["base"], sizes, DECODERS["qwen3-0.6B"])
    require_lfm2_vl(plain)
    for change in ({"norm_first": True}, {"linears": 3}, {"bias": False}, {"activation": "silu"}):
        with pytest.raises(ConfigError, match="has a projector like this one"):
            require_lfm2_vl(dataclasses.replace(plain, projector=dataclasses.replace(sizes, **change)))


@pytest.mark.parametrize("name", ["clip", "aimv2", "siglip"])
def test_the_tower_of_a_published_pair_is_taken_and_the_rest_is_named(tmp_path, name):
    """Files of image and text together, as CLIP and its kin are published."""
    from transformers import AutoConfig, AutoModel

    tower, config = theirs_and_config(name)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    values = {"text_config": text, "vision_config": tower.config.to_dict(), "projection_dim": 24}
    pair = AutoModel.from_config(AutoConfig.for_model(name, **values))
    pair.vision_model.load_state_dict(tower.state_dict())
    pair.save_pretrained(tmp_path / name)
    save(decoder_model(QWEN3), tmp_path / "decoder")
    job = job_of(encoder_path=tmp_path / name, decoder_path=tmp_path / "decoder")
    found, expected = load(job).encoder.state_dict(), ours_of(tower, config).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())
    assert "of the text tower, in whose place the decoder stands" in report(job)
