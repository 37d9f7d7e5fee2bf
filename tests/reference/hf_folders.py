"""Hugging Face folders of small models with random weights, and what transformers computes with them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.models import ENCODER, QWEN2, hf_text_config, hf_vision_config, randomise
from torchtitan.models.decoder.flavors import DecoderConfig


def save(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    randomise(model)
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def write_job(path: Path, tokenizer: object, format: str = "llava", template: str = "vicuna_v1") -> None:
    """A job that says how a folder's model is talked to; its data are never read."""
    path.write_text(
        f'[model]\ntokenizer_path = "{tokenizer}"\n'
        f'[[data.sources]]\nformat = "{format}"\npath = "nowhere"\nchat_template = "{template}"\n'
    )


def decoder_model(config: DecoderConfig) -> nn.Module:
    from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

    values = hf_text_config(config)
    if config.model_type != "mistral":
        return AutoModelForCausalLM.from_config(values)
    kept = {
        k: v for k, v in values.to_dict().items() if k not in ("model_type", "architectures", "layer_types")
    }
    return MistralForCausalLM(MistralConfig(**kept | {"sliding_window": config.window}))


def naflex_model(head: bool = False) -> nn.Module:
    from transformers import Siglip2VisionModel

    return Siglip2VisionModel(hf_vision_config(ENCODER, head))


def fixed_model(head: bool = False) -> nn.Module:
    """Images of 34 x 34 pixels, of which patches of 4 read 32."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    values = hf_vision_config(ENCODER, head).to_dict()
    kept = {k: v for k, v in values.items() if k not in ("model_type", "num_patches", "architectures")}
    return SiglipVisionModel(SiglipVisionConfig(**kept, image_size=34))


WIDTHS: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 4,
}


def clip_model() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**WIDTHS, image_size=34))


def aimv2_model(native: bool = True, **options) -> nn.Module:
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    sizes = WIDTHS | {"use_head": False, "image_size": 34} | options
    return Aimv2VisionModel(Aimv2VisionConfig(**sizes, is_native=native))


def dinov3_model(**options) -> nn.Module:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    return DINOv3ViTModel(DINOv3ViTConfig(**WIDTHS | {"num_register_tokens": 4} | options))


def whole_model(config: DecoderConfig = QWEN2, merge: int = 2, norm: bool = True) -> nn.Module:
    from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

    return Lfm2VlForConditionalGeneration(
        Lfm2VlConfig(
            text_config=hf_text_config(config),
            vision_config=hf_vision_config(ENCODER),
            image_token_id=3,
            projector_hidden_size=56,
            projector_use_layernorm=norm,
            downsample_factor=merge,
            tie_word_embeddings=config.tied_embeddings,
        )
    )


def state_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by the library of the format."""
    from safetensors.torch import load_file

    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
