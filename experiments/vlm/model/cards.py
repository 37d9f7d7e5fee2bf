"""What each flavor is made of, as the page docs/models.md. Models are built on the meta device alone."""

from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import nn

from experiments.vlm.model.config import EncoderConfig, ProjectorConfig, VLMConfig
from experiments.vlm.model.flavors import ENCODERS, FLAVORS
from experiments.vlm.model.vit import VisionEncoder
from experiments.vlm.model.vlm import Projector
from torchtitan.models.decoder.flavors import DECODERS, DecoderConfig
from torchtitan.models.decoder.model import Decoder

PUBLISHED = {  # where the weights of a part are
    "base": "google/siglip2-base-patch16-naflex",
    "so400m": "google/siglip2-so400m-patch16-naflex",
    "siglip-so400m": "google/siglip-so400m-patch14-384",
    "clip-L": "openai/clip-vit-large-patch14-336",
    "aimv2-L": "apple/aimv2-large-patch14-native",
    "dinov3-S": "facebook/dinov3-vits16-pretrain-lvd1689m",
    "dinov3-B": "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "dinov3-L": "facebook/dinov3-vitl16-pretrain-lvd1689m",
    "llama3.2-1B": "meta-llama/Llama-3.2-1B",
    "llama3.2-3B": "meta-llama/Llama-3.2-3B",
    "llama3.1-8B": "meta-llama/Llama-3.1-8B",
    "qwen2.5-0.5B": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5B": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-3B": "Qwen/Qwen2.5-3B",
    "qwen2.5-7B": "Qwen/Qwen2.5-7B",
    "qwen3-0.6B": "Qwen/Qwen3-0.6B",
    "qwen3-1.7B": "Qwen/Qwen3-1.7B",
    "qwen3-4B": "Qwen/Qwen3-4B",
    "qwen3-8B": "Qwen/Qwen3-8B",
}
BF16, TRAINED = 2, 16  # bytes a parameter: its weight; weight, gradient and two moments of AdamW in float32
INTRODUCTION = """# Models

What `model.flavor` names; any other size of these families trains too, from a folder's `config.json`.
`python scripts/download_hf_assets.py OWNER/NAME` fetches what is published; `scripts/model_cards.py` wrote
this page.

Parameters count once where embedding and output layer are one table (tied). A GB is 10^9 bytes. A parameter
takes 2 bytes in bfloat16, and 16 while AdamW trains it, divided among the ranks of FSDP: weight, gradient and
two moments in float32. Activations come on top: `scripts/estimate_memory.py` knows those of a job.
"""


def page() -> str:
    """The whole page, in Markdown."""
    encoders = table(ENCODER_HEAD, map(encoder_row, ENCODERS))
    decoders = table(DECODER_HEAD, map(decoder_row, DECODERS))
    flavors = table(FLAVOR_HEAD, map(flavor_row, FLAVORS))
    return f"{INTRODUCTION}\n## Encoders\n\n{encoders}\n## Decoders\n\n{decoders}\n## Flavors\n\n{flavors}"


ENCODER_HEAD = (
    *("encoder", "width", "layers", "heads", "MLP", "patch", "positions"),
    *("parameters", "bfloat16", "published"),
)


def encoder_row(name: str) -> Sequence[str]:
    """Sizes, parameters without a pooling head, and bytes of an encoder."""
    c = ENCODERS[name]
    positions = f"{c.position_grid} x {c.position_grid}" if c.positions == "table" else c.positions
    sizes = (c.dim, c.layers, c.heads, c.mlp_dim, c.patch_size, positions)
    return name, *map(str, sizes), *counted(encoder_parameters(c)), PUBLISHED.get(name, "")


DECODER_HEAD = (
    *("decoder", "width", "layers", "heads", "key-value heads", "head size", "MLP"),
    *("vocabulary", "tied", "parameters", "bfloat16", "published"),
)


def decoder_row(name: str) -> Sequence[str]:
    """Sizes, parameters and bytes of a decoder."""
    c = DECODERS[name]
    sizes = (c.dim, c.layers, c.heads, c.kv_heads, c.head_dim, c.mlp_dim, f"{c.vocab_size:,}")
    tied = "yes" if c.tied_embeddings else "no"
    return name, *map(str, sizes), tied, *counted(decoder_parameters(c)), PUBLISHED.get(name, "")


FLAVOR_HEAD = (
    *("flavor", "encoder: width x layers, parameters", "projector: width, parameters"),
    *("decoder: width x layers, parameters", "parameters", "bfloat16", "in training"),
)


def flavor_row(name: str) -> Sequence[str]:
    """Width, layers and parameters of each part, and the whole."""
    config = FLAVORS[name]
    encoder, projector, decoder = parameters(config)
    e, p, d = config.encoder, config.projector, config.decoder
    shapes = (
        f"{e.dim} x {e.layers}, {encoder:,}",
        f"{p.hidden_dim}, {projector:,}",
        f"{d.dim} x {d.layers}, {decoder:,}",
    )
    total = encoder + projector + decoder
    return name, *shapes, *counted(total), gigabytes(total * TRAINED)


def parameters(config: VLMConfig) -> tuple[int, int, int]:
    """Parameters of encoder, projector and decoder; the vocabulary as published."""
    projector = projector_parameters(config.projector, config.encoder.feature_dim, config.decoder.dim)
    return encoder_parameters(config.encoder), projector, decoder_parameters(config.decoder)


@cache
def encoder_parameters(config: EncoderConfig) -> int:
    """Parameters, without a pooling head."""
    with torch.device("meta"):
        return count(VisionEncoder(config, "sdpa"))


@cache
def projector_parameters(config: ProjectorConfig, encoder_dim: int, dim: int) -> int:
    """Parameters between an encoder and a decoder of these widths."""
    with torch.device("meta"):
        return count(Projector(config, encoder_dim, dim))


@cache
def decoder_parameters(config: DecoderConfig) -> int:
    """Parameters, with the vocabulary as published."""
    with torch.device("meta"):
        return count(Decoder(config, config.vocab_size, "sdpa", 1024))


def count(module: nn.Module) -> int:
    """Numbers in all parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def counted(number: int) -> tuple[str, str]:
    """Parameters, and bytes in bfloat16."""
    return f"{number:,}", gigabytes(number * BF16)


def gigabytes(size: int) -> str:
    """Three digits and more."""
    return f"{size / 1e9:.3g} GB" if size < 100e9 else f"{size / 1e9:.0f} GB"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
