"""SigLIP2 (NaFlex) vision encoder on packed rows of patches (Tschannen et al., 2025; NaViT, Dehghani et al.,
2023).

In: uint8 patches [N, L, C] and their coordinates. Out: features [N, L, D].

Unusual here: a row holds many images of any size, and attention stays inside each image; raw uint8 patches
come in and are normalised on the device; positions are resized for all images at once (positions.py). The
pooling head of the published model is left out, since a VLM reads the patches.

Letters: N rows, L patches, C values a patch (p * p * 3), D width, H heads, E width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.vlm.model.flavors import EncoderConfig
from experiments.vlm.model.positions import fill_with_waves, image_ids, interpolate_positions
from torchtitan.layers.attention import InnerAttention, prepare_mask
from torchtitan.layers.init import Fill, constant, fan_in
from torchtitan.layers.masks import Mask


class PatchEmbedding(nn.Module):
    """Pixels to [-1, 1], one linear map per patch, plus the learned position of its place in its image."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.projection = nn.Linear(config.patch_size**2 * 3, config.dim)
        self.positions = nn.Embedding(config.position_grid**2, config.dim)

    def forward(self, pixels_NLC: Tensor, grid_thw_NL3: Tensor, ids_NL: Tensor) -> Tensor:
        """uint8 [N, L, C] -> [N, L, D] in the dtype of the weights."""
        weight = self.projection.weight
        x_NLD = self.projection((pixels_NLC.float() / 127.5 - 1.0).to(weight.dtype))
        return x_NLD + interpolate_positions(self.positions.weight, grid_thw_NL3, ids_NL).to(weight.dtype)


class EncoderAttention(nn.Module):
    """Multi-head attention inside each image."""

    SAME_INPUT = ("wq", "wk", "wv")  # see backward_of

    def __init__(self, config: EncoderConfig, backend: str):
        super().__init__()
        self.head_dim = config.dim // config.heads
        self.wq = nn.Linear(config.dim, config.dim)
        self.wk = nn.Linear(config.dim, config.dim)
        self.wv = nn.Linear(config.dim, config.dim)
        self.inner = InnerAttention(backend)
        self.wo = nn.Linear(config.dim, config.dim)

    def forward(self, x_NLD: Tensor, mask: Any) -> Tensor:
        """[N, L, D] -> [N, L, D]. mask: what the backend prepared."""
        q, k, v = (w(x_NLD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        return self.wo(self.inner(q, k, v, mask).flatten(-2))


class EncoderMLP(nn.Module):
    """Two linear layers with bias and the tanh approximation of GELU in between."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.dim)

    def forward(self, x_NLD: Tensor) -> Tensor:
        """[N, L, D] -> [N, L, D]."""
        return self.fc2(F.gelu(self.fc1(x_NLD), approximate="tanh"))


class EncoderBlock(nn.Module):
    """One layer: attention and MLP, each on the normalised stream and added to it."""

    def __init__(self, config: EncoderConfig, backend: str):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attention = EncoderAttention(config, backend)
        self.mlp_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = EncoderMLP(config)

    def forward(self, x_NLD: Tensor, mask: Any) -> Tensor:
        """[N, L, D] -> [N, L, D]. mask: as in EncoderAttention."""
        x_NLD = x_NLD + self.attention(self.attention_norm(x_NLD), mask)
        return x_NLD + self.mlp(self.mlp_norm(x_NLD))


class VisionEncoder(nn.Module):
    """Embedding, blocks and the last norm. `backend`: a row of layers.attention.BACKENDS."""

    def __init__(self, config: EncoderConfig, backend: str):
        super().__init__()
        self.config = config
        self.backend = backend
        self.embedding = PatchEmbedding(config)
        self.layers = nn.ModuleDict({str(i): EncoderBlock(config, backend) for i in range(config.layers)})
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(self, pixels_NLC: Tensor, grid_thw_NL3: Tensor) -> Tensor:
        """uint8 patches and their (t, h, w) -> features [N, L, D] after the last norm.

        Rows of nothing but padding are fine.
        """
        ids_NL = image_ids(grid_thw_NL3)
        x_NLD = self.embedding(pixels_NLC, grid_thw_NL3, ids_NL)
        mask = prepare_mask(Mask(segments=ids_NL, causal=False), self.backend)
        for layer in self.layers.values():
            x_NLD = layer(x_NLD, mask)
        # Padding is exactly zero from here on, so that nothing of it can reach a gradient downstream.
        return torch.where((ids_NL >= 0)[..., None], self.norm(x_NLD), 0.0)


def initial_weight(name: str, config: EncoderConfig) -> Fill:
    """Matrices N(0, 1 / fan in), those that write to the residual stream divided by sqrt(2 * layers);
    positions sines and
    cosines; norms 1; biases 0."""
    if name.endswith("bias"):
        return constant(0.0)
    if "norm" in name:
        return constant(1.0)
    if "positions" in name:
        return lambda table_QD, generator: fill_with_waves(table_QD)
    writes_residual = name.endswith(("wo.weight", "fc2.weight"))
    return fan_in((2 * config.layers) ** -0.5 if writes_residual else 1.0)
