"""Learned positions, resized to every image of a batch at once.

SigLIP2 resizes its square table of positions to each image's (h, w) bilinearly, antialiased,
align_corners=False. That is separable and has closed-form weights, so all images are done in one matrix
product, without a loop, an interpolation kernel or a question to the device: per patch a weight for each row
and each column of the table.

A table for training from nothing starts as sines and cosines of row and column. Random entries would average
out on small images, whose places the model would then learn late.

Letters: N rows, L patches, P side of the table, D width.
"""

import torch
from torch import Tensor


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


def fill_with_waves(table_QD: Tensor) -> None:
    """Sine and cosine of the row, sine and cosine of the column (MAE, He et al., 2022), in waves of 4 down to
    1/4 table sides.

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
