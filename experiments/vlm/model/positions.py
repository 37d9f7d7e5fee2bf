"""Positions of patches, for every image of a batch at once: learned ones in a table that is resized to each
image, and two kinds that are computed, sines and cosines that are added (`waves`) and angles by which queries
and keys are turned (`axial_angles`).

SigLIP2 resizes its square table of positions to each image's (h, w) bilinearly, antialiased,
align_corners=False. That is separable and has closed-form weights, so all images are done in one matrix
product, without a loop, an interpolation kernel or a question to the device: per patch a weight for each row
and each column of the table.

A table for training from nothing starts as sines and cosines of row and column. Random entries would average
out on small images, whose places the model would then learn late.

Letters: N rows, L patches, P side of the table, D width, E width of a head.
"""

import torch
from torch import Tensor

from experiments.vlm.batch import EXTRA


def is_extra(grid_thw_NL3: Tensor) -> Tensor:
    """bool [N, L]: the cells that are no patch but class token or register of their image."""
    return grid_thw_NL3[..., 1] == EXTRA


def image_ids(grid_thw_NL3: Tensor) -> Tensor:
    """int32 [N, L]: which image of its row a patch belongs to, -1 on padding.

    An image starts where h and w are both 0.
    """
    t, h, w = grid_thw_NL3.unbind(-1)
    starts = (h == 0) & (w == 0)
    return torch.where(t >= 0, starts.cumsum(-1, dtype=torch.int32) - 1, -1)


def image_sizes(grid_thw_NL3: Tensor, ids_NL: Tensor) -> tuple[Tensor, Tensor]:
    """Height and width in patches of the image of each patch, int32 [N, L] twice; 1 on padding."""
    slot_NL = ids_NL.long().clamp_min(0)
    sizes = []
    for axis in (1, 2):
        place_NL = torch.where(ids_NL >= 0, grid_thw_NL3[..., axis], 0)
        highest_NL = torch.zeros_like(place_NL).scatter_reduce_(1, slot_NL, place_NL, "amax")
        sizes.append(torch.where(ids_NL >= 0, highest_NL.gather(1, slot_NL) + 1, 1))
    return sizes[0], sizes[1]


def resize_weights(place: Tensor, size: Tensor, table_side: int) -> Tensor:
    """Weight of each of P table cells for target cell `place` of `size`, float32 [..., P]; sums to 1.

    A triangle around the target's centre, as wide as the step where the table is shrunk (PyTorch's
    antialiased bilinear filter).
    """
    step = table_side / size.float()
    reach = step.clamp_min(1.0)
    centre = (place.float() + 0.5) * step
    cells = torch.arange(table_side, dtype=torch.float32, device=place.device) + 0.5
    weights = (1 - (cells - centre[..., None]).abs() / reach[..., None]).clamp_min(0)
    return weights / weights.sum(-1, keepdim=True)


def interpolate_positions(table_QD: Tensor, grid_thw_NL3: Tensor, ids_NL: Tensor) -> Tensor:
    """float32 [N, L, D] from a table of Q = P * P positions in raster order.

    Padding gets finite values that nothing reads.
    """
    side = round(table_QD.shape[0] ** 0.5)
    height_NL, width_NL = image_sizes(grid_thw_NL3, ids_NL)
    rows_NLP = resize_weights(grid_thw_NL3[..., 1].clamp_min(0), height_NL, side)
    columns_NLP = resize_weights(grid_thw_NL3[..., 2].clamp_min(0), width_NL, side)
    weights_NLQ = (rows_NLP[..., :, None] * columns_NLP[..., None, :]).flatten(-2)
    return weights_NLQ @ table_QD.float()


def waves(grid_thw_NL3: Tensor, width: int) -> Tensor:
    """float32 [N, L, D]: sine and cosine of the column, then of the row, of frequencies from 1 down to
    1 / 10,000 (AIMv2, Fini et al., 2024). Cells that are no patch get values that nothing reads.
    """
    frequency = 10_000.0 ** -(torch.arange(width // 4, device=grid_thw_NL3.device).double() / (width // 4))
    h_NLF, w_NLF = (grid_thw_NL3[..., axis, None] * frequency.float() for axis in (1, 2))
    return torch.cat([w_NLF.sin(), w_NLF.cos(), h_NLF.sin(), h_NLF.cos()], -1)


def axial_angles(grid_thw_NL3: Tensor, ids_NL: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [N, L, 1, E], for `rope.rotate`: a quarter of the angles is for the row of a
    patch and a quarter for its column, both twice (DINOv3, Simeoni et al., 2025).

    An image reaches from -1 to 1 along each side, whatever its size. Its extra cells are not turned.
    """
    quarter = head_dim // 4
    frequency = theta ** -(torch.arange(quarter, dtype=torch.float32, device=ids_NL.device) / quarter)
    angles = []
    for axis, size_NL in zip((1, 2), image_sizes(grid_thw_NL3, ids_NL), strict=True):
        place_NL = 2 * (grid_thw_NL3[..., axis] + 0.5) / size_NL - 1
        angles.append(2 * torch.pi * place_NL[..., None] * frequency)
    angle_NLE = torch.cat(angles * 2, -1)
    angle_NL1E = torch.where(is_extra(grid_thw_NL3)[..., None], 0.0, angle_NLE).unsqueeze(-2)
    return angle_NL1E.cos(), angle_NL1E.sin()


def fill_with_waves(table_QD: Tensor) -> None:
    """Sines and cosines of row and column (MAE, He et al., 2022), in waves of 4 down to 1/4 table sides.

    Slow waves pass the averaging of `interpolate_positions` whatever the image's size.
    """
    places, width = table_QD.shape
    side, waves = round(places**0.5), -(-width // 4)
    cells = torch.arange(side, dtype=torch.float32, device=table_QD.device) + 0.5
    octaves = torch.arange(waves, dtype=torch.float32, device=table_QD.device) * 4 / waves
    angle_PW = cells[:, None] * (torch.pi / (2 * side)) * 2**octaves
    wave_PE = torch.cat([angle_PW.sin(), angle_PW.cos()], -1)
    rows_PPE, columns_PPE = wave_PE[:, None].expand(-1, side, -1), wave_PE[None].expand(side, -1, -1)
    table_QD.copy_(torch.cat([rows_PPE, columns_PPE], -1).flatten(0, 1)[:, :width])
