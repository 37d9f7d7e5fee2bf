"""Rotary position embedding in the half-split layout of Hugging Face weights (RoFormer, Su et al., 2021),
with Llama 3.1's scaling.

Only `angles` reads positions, once per step; layers take cosine and sine, in float32 whatever the model's
dtype: a cast to bfloat16 on the way to a layer would round positions beyond 256.
"""

import math

import torch
from torch import Tensor

from torchtitan.layers.rope_scaling import RopeScaling


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device
) -> Tensor:
    """float32 [head_dim / 2].

    Computed on the device from constants: no buffer to initialise, load or shard.
    """
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    # 0 for wavelengths that are stretched by the whole factor, 1 for those left alone, linear between.
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def angles(
    positions_BS: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [B, S, 1, head_dim]: both halves hold the same angles."""
    frequency = inverse_frequencies(head_dim, theta, scaling, positions_BS.device)
    angle = positions_BS[..., None, None].float() * frequency
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def rotate(x_BSHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [B, S, H, E], turned by cos and sin [B, S, 1, E], which `angles` gives."""
    first, second = x_BSHE.float().chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (x_BSHE.float() * cos + turned * sin).to(x_BSHE.dtype)
