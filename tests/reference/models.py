"""Small models with random weights for tests, and their Hugging Face counterparts' configurations."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from experiments.vlm.model.config import EncoderConfig, ProjectorConfig, VLMConfig
from experiments.vlm.model.vlm import VLM
from torchtitan.layers.rope_scaling import RopeScaling
from torchtitan.models.decoder.flavors import DecoderConfig

VOCAB = 96

# Wavelengths of the 8 angles run from 6 to 6,000 tokens, so a context of 64 exercises all three branches of
# the scaling.
LLAMA = DecoderConfig(
    64, 2, 4, 2, 16, 96, VOCAB, 10000.0, RopeScaling(8.0, 1.0, 4.0, original_context=64), norm_eps=1e-5
)
QWEN2 = DecoderConfig(64, 2, 4, 2, 16, 96, VOCAB, 10000.0, qkv_bias=True, tied_embeddings=True)
QWEN3 = DecoderConfig(64, 2, 4, 2, 24, 96, VOCAB, 10000.0, qk_norm=True)
ENCODER = EncoderConfig(48, 2, 4, 80, patch_size=4, position_grid=8)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Every parameter random, biases and norms too: one that is read nowhere, or twice, then shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                # Norms around 1, biases around 0; what they were drawn as before does not count.
                centre = parameter.round()
                parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
                )


def small_vlm(
    decoder: DecoderConfig = LLAMA,
    merge: int = 2,
    backend: str = "sdpa",
    loss_chunk: int = 16,
    seed: int = 0,
    **changes,
) -> VLM:
    """`changes` are fields of the encoder's configuration."""
    config = VLMConfig(
        dataclasses.replace(ENCODER, **changes), ProjectorConfig(56, merge_size=merge), decoder
    )
    model = VLM(config, decoder.vocab_size, backend, loss_chunk)
    randomise(model, seed)
    return model


def require_gradients_of(theirs: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """That these are the gradients of the other model, by its names."""
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        # The true gradient of a key's bias is 0: compare it with the others, not with its own noise.
        most = 1e-3 * max(gradient.abs().max(), 1e-3 * largest)
        assert (gradients[name] - gradient).abs().max() < most, name


def loss_and_gradients(
    model: VLM, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch)
    loss.sum().backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def hf_text_config(config: DecoderConfig):
    """LlamaConfig, Qwen2Config or Qwen3Config of the same sizes."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    kind = Qwen2Config if config.qkv_bias else Qwen3Config if config.qk_norm else LlamaConfig
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return kind(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied_embeddings,
        rope_parameters=rope,
        max_position_embeddings=4096,
        pad_token_id=None,
    )


def hf_vision_config(config: EncoderConfig, head: bool = False):
    from transformers import Siglip2VisionConfig

    return Siglip2VisionConfig(
        hidden_size=config.dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        patch_size=config.patch_size,
        num_patches=config.position_grid**2,
        layer_norm_eps=config.norm_eps,
        vision_use_head=head,
    )
