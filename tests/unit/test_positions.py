"""Positions resized in closed form against PyTorch's bilinear, antialiased interpolation."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from experiments.vlm.model.positions import fill_with_waves, image_ids, image_sizes, interpolate_positions
from tests.reference.batches import merge_order

SIZES = [
    (1, 1),
    (1, 2),
    (2, 1),
    (3, 3),
    (16, 16),
    (15, 17),
    (17, 15),
    (31, 7),
    (64, 16),
    (16, 64),
    (5, 100),
    (100, 5),
    (40, 3),
]
SIZES += [(1, 200), (200, 1), (32, 32), (33, 31), (8, 8), (7, 13), (48, 2)]


def grid(sizes: list[tuple[int, int]], length: int, merge: int = 1) -> torch.Tensor:
    """int32 [1, length, 3] of the images one after the other."""
    cells = [[0, h, w] for height, width in sizes for h, w in merge_order(height, width, merge)]
    result = torch.full((1, length, 3), -1, dtype=torch.int32)
    result[0, : len(cells)] = torch.tensor(cells)
    return result


def resized(table: torch.Tensor, side: int, height: int, width: int) -> torch.Tensor:
    """The reference, [height, width, D].

    PyTorch's CPU kernel repeats the first row where the result is one column wide and higher than one (seen
    in 2.13 and 2.15, any dtype); its transpose is right.
    """
    if width == 1 < height:
        flipped = table.unflatten(0, (side, side)).transpose(0, 1).flatten(0, 1)
        return resized(flipped, side, width, height).transpose(0, 1)
    image = table.unflatten(0, (side, side)).permute(2, 0, 1)[None]
    image = F.interpolate(image, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return image[0].permute(1, 2, 0)


@pytest.mark.parametrize("side", [16, 8, 27])
def test_every_size_equals_interpolate(side):
    table = torch.randn(side * side, 24, generator=torch.Generator().manual_seed(0))
    total = sum(h * w for h, w in SIZES)
    grid_thw = grid(SIZES, total + 9)
    result = interpolate_positions(table, grid_thw, image_ids(grid_thw))[0]
    start = 0
    for height, width in SIZES:
        part = result[start : start + height * width].unflatten(0, (height, width))
        # A place on a side of 27 cells is known to 2e-6 in float32, on both sides; seen: 6e-6 at 5 x 100.
        assert (part - resized(table, side, height, width)).abs().max() < 1e-5, (height, width)
        start += height * width
    assert result[total:].isfinite().all()


def test_gradient_of_the_table_equals_interpolate():
    sizes = [(6, 2), (4, 10), (20, 18)]
    table = torch.randn(64, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    grid_thw = grid(sizes, 450)
    weights = torch.randn(450, 12, generator=torch.Generator().manual_seed(1))
    used = sum(h * w for h, w in sizes)
    (interpolate_positions(table, grid_thw, image_ids(grid_thw))[0, :used] * weights[:used]).sum().backward()
    ours, table.grad = table.grad, None
    expected = torch.cat([resized(table, 8, h, w).flatten(0, 1) for h, w in sizes])
    (expected * weights[:used]).sum().backward()
    assert (ours - table.grad).abs().max() < 1e-5 * table.grad.abs().max()


def test_images_of_a_row_are_told_apart_by_their_first_patch():
    sizes = [(2, 4), (2, 2), (4, 2), (2, 2), (2, 2)]
    grid_thw = grid(sizes, 32, merge=2)
    ids = image_ids(grid_thw)
    expected = [i for i, (h, w) in enumerate(sizes) for _ in range(h * w)]
    assert ids[0].tolist() == expected + [-1] * (32 - len(expected))
    heights, widths = image_sizes(grid_thw, ids)
    assert heights[0, : len(expected)].tolist() == [sizes[i][0] for i in expected]
    assert widths[0, : len(expected)].tolist() == [sizes[i][1] for i in expected]


def test_each_frame_of_a_video_is_a_segment_of_its_own():
    frame = grid([(2, 3)], 6)
    video = torch.cat([frame, frame, frame], 1)
    video[0, :, 0] = torch.arange(3, dtype=torch.int32).repeat_interleave(6)
    assert image_ids(video)[0].tolist() == [0] * 6 + [1] * 6 + [2] * 6


def test_rows_are_independent():
    one, two = grid([(3, 5)], 20), grid([(2, 2), (4, 4)], 20)
    table = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    both = torch.cat([one, two])
    together = interpolate_positions(table, both, image_ids(both))
    for row, alone in enumerate((one, two)):
        assert torch.allclose(
            together[row], interpolate_positions(table, alone, image_ids(alone))[0], atol=1e-6
        )


@pytest.mark.parametrize(("side", "width"), [(16, 128), (5, 30)])
def test_the_first_table_holds_waves_of_row_and_column(side, width):
    table = torch.empty(side * side, width)
    fill_with_waves(table)
    waves = -(-width // 4)
    for place, channel in itertools.product(range(0, side * side, 3), range(width)):
        (axis, phase), wave = divmod(channel // waves, 2), channel % waves
        angle = 2 * math.pi * (divmod(place, side)[axis] + 0.5) / (4 * side / 16 ** (wave / waves))
        assert table[place, channel] == pytest.approx((math.sin, math.cos)[phase](angle), abs=1e-4)


@pytest.mark.parametrize(("size", "other"), [((2, 2), (2, 4)), ((2, 12), (12, 2)), ((4, 2), (2, 4))])
def test_small_images_of_other_shapes_start_with_other_positions(size, other):
    """As far apart as the table's rows are themselves, though each place is the mean of many of them."""
    table = torch.empty(256, 128)
    fill_with_waves(table)
    places = [grid([shape], shape[0] * shape[1]) for shape in (size, other)]
    here, there = (interpolate_positions(table, place, image_ids(place))[0, -1] for place in places)
    assert (here - there).norm() > 0.3 * table.norm(dim=1).mean()
