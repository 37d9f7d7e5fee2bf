"""Sizes against the published models:
parameters of what transformers builds from each model's config.json.
"""

import pytest
import torch

from experiments.vlm.model.flavors import ENCODERS, FLAVORS
from experiments.vlm.model.vit import VisionEncoder
from experiments.vlm.model.vlm import VLM
from torchtitan.models.decoder.flavors import DECODERS
from torchtitan.models.decoder.model import Decoder

# transformers 5.23 on the meta device, tied weights once. Llama 3.2 3B, 3.1 8B, Qwen2.5 3B, 7B and Qwen3 4B,
# 8B agree with the total_size of their published model.safetensors.index.json.
DECODER_PARAMETERS = {
    "llama3.2-1B": 1_235_814_400,  # meta-llama/Llama-3.2-1B-Instruct
    "llama3.2-3B": 3_212_749_824,  # meta-llama/Llama-3.2-3B-Instruct
    "llama3.1-8B": 8_030_261_248,  # meta-llama/Llama-3.1-8B-Instruct
    "qwen2.5-0.5B": 494_032_768,  # Qwen/Qwen2.5-0.5B
    "qwen2.5-1.5B": 1_543_714_304,  # Qwen/Qwen2.5-1.5B
    "qwen2.5-3B": 3_085_938_688,  # Qwen/Qwen2.5-3B
    "qwen2.5-7B": 7_615_616_512,  # Qwen/Qwen2.5-7B-Instruct
    "qwen3-0.6B": 596_049_920,  # Qwen/Qwen3-0.6B
    "qwen3-1.7B": 1_720_574_976,  # Qwen/Qwen3-1.7B
    "qwen3-4B": 4_022_468_096,  # Qwen/Qwen3-4B
    "qwen3-8B": 8_190_735_360,  # Qwen/Qwen3-8B
}
# The vision tower without its pooling head.
ENCODER_PARAMETERS = {
    "base": 85_843_200,  # google/siglip2-base-patch16-naflex
    "large": 303_361_024,  # google/siglip2-large-patch16: sizes of the paper
    "so400m": 412_649_712,  # google/siglip2-so400m-patch16-naflex
    "giant": 1_134_838_272,  # google/siglip2-giant-opt-patch16: sizes of the paper
    # transformers 5.24 on the meta device, without pooling heads.
    "siglip-so400m": 412_987_248,  # google/siglip-so400m-patch14-384
    "clip-L": 303_507_456,  # openai/clip-vit-large-patch14-336
    "aimv2-L": 308_935_680,  # apple/aimv2-large-patch14-native
    "dinov3-S": 21_596_544,  # facebook/dinov3-vits16-pretrain-lvd1689m, with its mask token
    "dinov3-B": 85_660_416,  # facebook/dinov3-vitb16-pretrain-lvd1689m
    "dinov3-L": 303_129_600,  # facebook/dinov3-vitl16-pretrain-lvd1689m
}


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", DECODER_PARAMETERS)
def test_decoders_have_the_published_number_of_parameters(name):
    config = DECODERS[name]
    with torch.device("meta"):
        assert parameters(Decoder(config, config.vocab_size, "sdpa", 1024)) == DECODER_PARAMETERS[name]


@pytest.mark.parametrize("name", ENCODER_PARAMETERS)
def test_encoders_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        assert parameters(VisionEncoder(ENCODERS[name], "sdpa")) == ENCODER_PARAMETERS[name]


def test_every_row_is_compared():
    assert set(DECODERS) == set(DECODER_PARAMETERS) | {"debug"}
    assert set(ENCODERS) == set(ENCODER_PARAMETERS)


def test_every_encoder_goes_with_every_decoder():
    # Tests of layouts add rows of their own.
    assert {"debugmodel"} | {f"{e}-{d}" for e in ENCODERS for d in DECODER_PARAMETERS} <= set(FLAVORS)
    config = FLAVORS["so400m-llama3.2-1B"]
    with torch.device("meta"):
        model = VLM(config, config.decoder.vocab_size, "sdpa", 1024)
    assert parameters(model.encoder) + parameters(model.decoder) == 412_649_712 + 1_235_814_400


def test_heads_divide_widths():
    for config in ENCODERS.values():
        assert config.dim % config.heads == 0
    for config in DECODERS.values():
        assert config.heads % config.kv_heads == 0 and config.head_dim % 2 == 0
