"""Patches, and what an image has besides them, as the vectors that the first layer of an encoder reads.

Pixels come in raw and are normalised on the device. Class token and registers have cells of their own behind
the patches of their image (h = w = -2): they have no pixels, and get learned vectors.

Letters: N rows, L cells, C values a patch (p * p * 3), D width, E class token and registers together.
"""

import torch
from torch import Tensor, nn

from experiments.vlm.model.config import EncoderConfig
from experiments.vlm.model.positions import interpolate_positions, is_extra, waves

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


def make_norm(config: EncoderConfig) -> nn.Module:
    """A norm of the encoder's kind, over its width."""
    return NORMS[config.norm](config.dim, eps=config.norm_eps)


class PatchEmbedding(nn.Module):
    """One linear map per patch, plus the position of its place in its image; learned vectors in extra cells.

    Its modules stand in the order in which they compute, which backward_of relies on.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.projection = nn.Linear(config.patch_size**2 * 3, config.dim, bias=config.patch_bias)
        if config.embedding_norm == "patches":
            self.norm = make_norm(config)
        if config.positions == "table":
            self.positions = nn.Embedding(config.position_grid**2, config.dim)
        if config.extra_cells:
            self.cells = ExtraCells(config)
        if config.embedding_norm == "all":
            self.norm = make_norm(config)
        if config.mask_token:
            self.mask_token = nn.Parameter(torch.zeros(config.dim), requires_grad=False)

    def forward(self, pixels_NLC: Tensor, grid_thw_NL3: Tensor, ids_NL: Tensor) -> Tensor:
        """uint8 [N, L, C] -> [N, L, D] in the dtype of the weights."""
        config, dtype = self.config, self.projection.weight.dtype
        x_NLD = self.projection(normalised(pixels_NLC, config).to(dtype))
        if config.embedding_norm == "patches":
            x_NLD = self.norm(x_NLD)
        if config.positions == "table":
            x_NLD = x_NLD + interpolate_positions(self.positions.weight, grid_thw_NL3, ids_NL).to(dtype)
        elif config.positions == "waves":
            x_NLD = x_NLD + waves(grid_thw_NL3, config.dim).to(dtype)
        if config.extra_cells:
            x_NLD = self.cells(x_NLD, grid_thw_NL3)
        return self.norm(x_NLD) if config.embedding_norm == "all" else x_NLD


class ExtraCells(nn.Module):
    """Class token first, then registers. Where positions are a table, the class token has its own."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.count = config.extra_cells
        self.class_token = nn.Parameter(torch.zeros(config.dim)) if config.class_token else None
        placed = config.class_token and config.positions == "table"
        self.class_position = nn.Parameter(torch.zeros(1, config.dim)) if placed else None
        self.registers = nn.Parameter(torch.zeros(config.registers, config.dim)) if config.registers else None

    def forward(self, x_NLD: Tensor, grid_thw_NL3: Tensor) -> Tensor:
        """[N, L, D] with the learned vectors in its extra cells, of which every image has all, in order."""
        extra_NL = is_extra(grid_thw_NL3)
        number_NL = (extra_NL.cumsum(-1) - 1) % self.count
        # A product, not a look-up, whose backward would add thousands of rows at few addresses.
        is_number_NLE = number_NL[..., None] == torch.arange(self.count, device=x_NLD.device)
        learned_NLD = is_number_NLE.to(x_NLD.dtype) @ self._vectors().to(x_NLD.dtype)
        return torch.where(extra_NL[..., None], learned_NLD, x_NLD)

    def _vectors(self) -> Tensor:
        """[E, D]."""
        vectors = []
        if self.class_token is not None:
            token = self.class_token[None]
            vectors.append(token if self.class_position is None else token + self.class_position)
        if self.registers is not None:
            vectors.append(self.registers)
        return torch.cat(vectors)


def normalised(pixels_NLC: Tensor, config: EncoderConfig) -> Tensor:
    """uint8 -> float32, minus the mean of each colour and over its deviation."""
    scale = tuple(255 * deviation for deviation in config.deviation)
    shift = tuple(m / d for m, d in zip(config.mean, config.deviation, strict=True))
    if len({*scale}) == len({*shift}) == 1:
        return pixels_NLC.float() / scale[0] - shift[0]
    pixels = pixels_NLC.shape[-1] // 3
    scale_C, shift_C = (_vector(values, pixels_NLC.device).repeat(pixels) for values in (scale, shift))
    return pixels_NLC.float() / scale_C - shift_C


def _vector(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Made on the device, since a copy from the host would wait for it."""
    return torch.cat([torch.full((1,), value, device=device) for value in values])
