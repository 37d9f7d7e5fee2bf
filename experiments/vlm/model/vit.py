"""Vision encoder on packed rows of patches (NaViT, Dehghani et al., 2023): SigLIP2 (Tschannen et al., 2025),
and by the switches of its configuration the towers of CLIP, AIMv2, DINOv3 and their kin.

In: uint8 patches [N, L, C] and their coordinates. Out: features [N, L, D].

Unusual here: a row holds many images of any size, and attention stays inside each image, its class token and
registers included; raw uint8 patches come in and are normalised on the device (patch_embedding.py); positions
are resized for all images at once (positions.py). Pooling heads of published models are left out, since a VLM
reads the patches. Layers behind the feature that is read do not run, and do not train.

Letters: N rows, L patches, C values a patch (p * p * 3), D width, H heads, E width of a head.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.vlm.model.config import EncoderConfig
from experiments.vlm.model.patch_embedding import PatchEmbedding, make_norm
from experiments.vlm.model.positions import axial_angles, fill_with_waves, image_ids, is_extra
from torchtitan.layers.attention import InnerAttention, prepare_mask
from torchtitan.layers.init import Fill, constant, fan_in
from torchtitan.layers.masks import Mask
from torchtitan.layers.rope import rotate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
}
Angles = tuple[Tensor, Tensor] | None  # cosine and sine, float32 [N, L, 1, E]; None: nothing is turned


class EncoderAttention(nn.Module):
    """Multi-head attention inside each image."""

    SAME_INPUT = ("wq", "wk", "wv")  # see backward_of

    def __init__(self, config: EncoderConfig, backend: str):
        super().__init__()
        self.head_dim = config.dim // config.heads
        self.wq, self.wk, self.wv = (
            nn.Linear(config.dim, config.dim, bias=name in config.attention_biases) for name in "qkv"
        )
        self.inner = InnerAttention(backend)
        self.wo = nn.Linear(config.dim, config.dim, bias="o" in config.attention_biases)

    def forward(self, x_NLD: Tensor, mask: Any, angles: Angles) -> Tensor:
        """[N, L, D] -> [N, L, D]. mask: what the backend prepared."""
        q, k, v = (w(x_NLD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        return self.wo(self.inner(q, k, v, mask).flatten(-2))


class EncoderMLP(nn.Module):
    """Two linear layers with an activation in between. Gated: a third one, parallel to the first, goes
    through the activation (Shazeer, 2020).
    """

    SAME_INPUT = ("gate", "fc1")

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.activation, self.gated = ACTIVATIONS[config.activation], config.gated_mlp
        if self.gated:
            self.gate = nn.Linear(config.dim, config.mlp_dim, bias=config.mlp_bias)
        self.fc1 = nn.Linear(config.dim, config.mlp_dim, bias=config.mlp_bias)
        self.fc2 = nn.Linear(config.mlp_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x_NLD: Tensor) -> Tensor:
        """[N, L, D] -> [N, L, D]."""
        if self.gated:
            return self.fc2(self.activation(self.gate(x_NLD)) * self.fc1(x_NLD))
        return self.fc2(self.activation(self.fc1(x_NLD)))


class LayerScale(nn.Module):
    """A learned factor for each channel (Touvron et al., 2021)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_NLD: Tensor) -> Tensor:
        """[N, L, D] -> [N, L, D]."""
        return x_NLD * self.weight


class EncoderBlock(nn.Module):
    """One layer: attention and MLP, each on the normalised stream and added to it."""

    def __init__(self, config: EncoderConfig, backend: str):
        super().__init__()
        scaled = config.layer_scale
        self.attention_norm = make_norm(config)
        self.attention = EncoderAttention(config, backend)
        self.attention_scale = LayerScale(config.dim) if scaled else nn.Identity()
        self.mlp_norm = make_norm(config)
        self.mlp = EncoderMLP(config)
        self.mlp_scale = LayerScale(config.dim) if scaled else nn.Identity()

    def forward(self, x_NLD: Tensor, mask: Any, angles: Angles = None) -> Tensor:
        """[N, L, D] -> [N, L, D]. mask, angles: as in EncoderAttention."""
        x_NLD = x_NLD + self.attention_scale(self.attention(self.attention_norm(x_NLD), mask, angles))
        return x_NLD + self.mlp_scale(self.mlp(self.mlp_norm(x_NLD)))


class VisionEncoder(nn.Module):
    """Embedding, blocks and the last norm. `backend`: a row of layers.attention.BACKENDS."""

    def __init__(self, config: EncoderConfig, backend: str):
        super().__init__()
        self.config = config
        self.backend = backend
        self.embedding = PatchEmbedding(config)
        self.layers = nn.ModuleDict({str(i): EncoderBlock(config, backend) for i in range(config.layers)})
        self.norm = make_norm(config)
        self.depth = max(config.feature_depths)  # layers that run
        running = tuple(f"{name}." for name in self.running())
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name.startswith(running))

    def running(self) -> list[str]:
        """Its modules that run, in that order. The others are kept for export."""
        layers = [f"layers.{number}" for number in self.layers if int(number) < self.depth]
        return ["embedding", *layers, *(["norm"] if self.config.feature_norm else [])]

    def role(self, number: str) -> str:
        """How a layer differs from others of its sizes: it does not run, or gives one of several features."""
        done = int(number) + 1
        if done > self.depth:
            return "behind"
        return number if done < self.depth and done in self.config.feature_depths else ""

    def forward(self, pixels_NLC: Tensor, grid_thw_NL3: Tensor) -> Tensor:
        """uint8 patches and their (t, h, w) -> features [N, L, D], several of them side by side.

        Rows of nothing but padding are fine.
        """
        ids_NL, config = image_ids(grid_thw_NL3), self.config
        x_NLD = self.embedding(pixels_NLC, grid_thw_NL3, ids_NL)
        mask, angles = prepare_mask(Mask(segments=ids_NL, causal=False), self.backend), None
        if config.positions == "rotary":
            angles = axial_angles(grid_thw_NL3, ids_NL, config.dim // config.heads, config.rotary_theta)
        used_NL = ids_NL >= 0
        if config.extra_cells and not config.feature_extra:
            used_NL = used_NL & ~is_extra(grid_thw_NL3)
        # What is not used is exactly zero from here on, so that nothing of it can reach a gradient
        # downstream.
        return torch.where(used_NL[..., None], self._features(x_NLD, mask, angles), 0.0)

    def _features(self, x_NLD: Tensor, mask: Any, angles: Angles) -> Tensor:
        depths = self.config.feature_depths
        found = {0: x_NLD}
        for number, layer in self.layers.items():
            if int(number) < self.depth:
                x_NLD = layer(x_NLD, mask, angles)
                if int(number) + 1 in depths:
                    found[int(number) + 1] = x_NLD
        found[self.depth] = x_NLD
        features = [self.norm(found[depth]) if self.config.feature_norm else found[depth] for depth in depths]
        return features[0] if len(features) == 1 else torch.cat(features, -1)


def initial_weight(name: str, config: EncoderConfig) -> Fill:
    """Matrices N(0, 1 / fan in), those that write to the residual stream divided by sqrt(2 * layers); a table
    of positions sines and cosines; vectors of extra cells N(0, 1 / width); norms and scales 1; biases, and
    what is never run, 0.
    """
    if name.endswith(("bias", "mask_token")):
        return constant(0.0)
    if "norm" in name or "_scale" in name:
        return constant(1.0)
    if "positions" in name:
        return lambda table_QD, generator: fill_with_waves(table_QD)
    writes_residual = name.endswith(("wo.weight", "fc2.weight"))
    return fan_in((2 * config.layers) ** -0.5 if writes_residual else 1.0)
