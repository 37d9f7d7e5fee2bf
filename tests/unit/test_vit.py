"""The encoder against transformers' Siglip2VisionModel at the same random weights: mixed sizes, several
images to a row.
"""

import dataclasses

import pytest
import torch

from experiments.vlm.model.positions import image_ids
from experiments.vlm.model.vit import VisionEncoder
from tests.reference.batches import (
    Picture,
    Sizes,
    draw_pictures,
    merge_order,
    pack_pictures,
    pad_for_transformers,
)
from tests.reference.hf_names import ENCODER_ROWS
from tests.reference.models import ENCODER, hf_vision_config, randomise, require_gradients_of
from torchtitan.layers.attention import prepare_mask
from torchtitan.layers.masks import Mask
from torchtitan.models.weight_names import read, write

# Per merge size, the images of each row, (height, width) in patches. None is one patch wide and higher than
# one: there PyTorch's CPU interpolation, which transformers uses, is wrong (test_positions.py).
ROWS = {
    1: [[(5, 3), (1, 7), (9, 2), (4, 4)], [(1, 1), (11, 5)]],
    2: [[(4, 6), (2, 12), (10, 2), (2, 2)], [(8, 10)], [(6, 4), (4, 14)]],
    3: [[(3, 9), (6, 6)], [(12, 3), (3, 3), (3, 15)]],
}


def pack(rows: list[list[Picture]], merge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """With some padding at the end of every row."""
    return pack_pictures(rows, Sizes(seq_len=128, patches_per_row=117, merge=merge))


def raster(features: torch.Tensor, rows: list[list[Picture]], merge: int) -> list[torch.Tensor]:
    """Packed features [N, L, D] -> per image [h * w, D] in raster order."""
    result = []
    for row, pictures in enumerate(rows):
        start = 0
        for picture in pictures:
            height, width = picture.size
            order = torch.tensor([h * width + w for h, w in merge_order(height, width, merge)])
            result.append(features[row, start + order.argsort()])
            start += height * width
    return result


def pair(head: bool = False, **changes) -> tuple[VisionEncoder, torch.nn.Module]:
    from transformers import Siglip2VisionModel

    config = dataclasses.replace(ENCODER, **changes)
    theirs = Siglip2VisionModel(hf_vision_config(config, head)).float().eval()
    randomise(theirs)
    ours = VisionEncoder(config, "sdpa")
    ours.load_state_dict(read(theirs.state_dict(), ENCODER_ROWS).named)
    return ours, theirs


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_features_and_gradients_equal_transformers(merge):
    ours, theirs = pair()
    rows = draw_pictures(ROWS[merge])
    flat = [picture for row in rows for picture in row]
    features = raster(ours(*pack(rows, merge)), rows, merge)
    expected = theirs(**pad_for_transformers(flat)).last_hidden_state
    loss, expected_loss = torch.zeros(()), torch.zeros(())
    for i, (picture, feature) in enumerate(zip(flat, features, strict=True)):
        reference = expected[i, : len(feature)]
        assert (feature - reference).abs().max() < 1e-3, picture.size
        weights = torch.randn(feature.shape, generator=torch.Generator().manual_seed(i))
        loss, expected_loss = loss + (feature * weights).sum(), expected_loss + (reference * weights).sum()
    loss.backward()
    expected_loss.backward()
    gradients = write({name: p.grad for name, p in ours.named_parameters()}, ENCODER_ROWS)
    require_gradients_of(theirs, gradients)


def test_one_layer_equals_transformers():
    ours, theirs = pair()
    rows = draw_pictures(ROWS[2])
    _, grid_thw = pack(rows, 2)
    ids = image_ids(grid_thw)
    x = torch.randn(*ids.shape, ENCODER.dim, generator=torch.Generator().manual_seed(0))
    result = ours.layers["0"](x, prepare_mask(Mask(ids, causal=False), "sdpa"))
    same_image = (ids[:, :, None] == ids[:, None, :])[:, None]
    expected = theirs.encoder.layers[0](x, same_image)
    assert (result - expected)[ids >= 0].abs().max() < 1e-4


def test_square_images_of_the_table_equal_the_fixed_size_model():
    """SiglipVisionModel embeds whole images by a convolution: another reader of the same weights."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=4,
        image_size=32,
        vision_use_head=False,
    )
    theirs = SiglipVisionModel(config).float().eval()
    randomise(theirs)
    ours = VisionEncoder(ENCODER, "sdpa")
    ours.load_state_dict(read(theirs.state_dict(), ENCODER_ROWS).named)
    image = torch.randint(
        0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    patches = image[0].unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 3, 4, 0).flatten(2)
    features = raster(ours(*pack([[Picture(patches)]], 2)), [[Picture(patches)]], 2)[0]
    expected = theirs((image.float() / 255 - 0.5) / 0.5).last_hidden_state[0]
    assert (features - expected).abs().max() < 1e-3


def test_changing_one_image_changes_no_other_image():
    ours, _ = pair()
    rows = draw_pictures(ROWS[2])
    pixels, grid_thw = pack(rows, 2)
    before = raster(ours(pixels, grid_thw), rows, 2)
    other = pixels.clone()
    other[0, 24:48] = 255 - other[0, 24:48]  # the second image of the first row, 2 x 12 patches
    after = raster(ours(other, grid_thw), rows, 2)
    assert not torch.equal(before[1], after[1])
    for i in range(len(before)):
        assert i == 1 or torch.equal(before[i], after[i]), i


def test_a_batch_without_images_gives_zeros_and_zero_gradients():
    ours, _ = pair()
    features = ours(
        torch.full((2, 64, 48), 7, dtype=torch.uint8), torch.full((2, 64, 3), -1, dtype=torch.int32)
    )
    features.sum().backward()
    assert torch.equal(features, torch.zeros(2, 64, 48))
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, torch.zeros_like(parameter)), name
