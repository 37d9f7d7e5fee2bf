"""Batches by the contract, built document by document with plain loops: what the packer and the loader must
agree with.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE_ID = 3


@dataclass
class Picture:
    patches: Tensor  # uint8 [h, w, p * p * 3]

    @property
    def size(self) -> tuple[int, int]:
        return self.patches.shape[0], self.patches.shape[1]


Part = list[int] | Picture
Document = list[Part]


def draw_picture(height: int, width: int, patch_size: int, seed: int) -> Picture:
    """Noise of the given size in patches."""
    generator = torch.Generator().manual_seed(seed)
    return Picture(
        torch.randint(0, 256, (height, width, patch_size**2 * 3), dtype=torch.uint8, generator=generator)
    )


def draw_pictures(rows: list[list[tuple[int, int]]]) -> list[list[Picture]]:
    """One for each size in patches of 4 x 4 pixels."""
    return [
        [draw_picture(*size, 4, seed=100 * r + i) for i, size in enumerate(row)] for r, row in enumerate(rows)
    ]


def merge_order(height: int, width: int, merge: int) -> list[tuple[int, int]]:
    """(h, w) of an image's patches in the order of the contract: visual tokens in raster order, and inside
    each its patches.
    """
    tokens = [(h, w) for h in range(0, height, merge) for w in range(0, width, merge)]
    return [(h + dh, w + dw) for h, w in tokens for dh in range(merge) for dw in range(merge)]


@dataclass
class Sizes:
    seq_len: int
    patches_per_row: int
    patch_rows: int = 1
    patch_size: int = 4
    merge: int = 2
    extra: int = 0  # class token and registers of each image
    newline: bool = False  # as with tiles: an image's visual tokens end in one
    mixed: bool = False  # as with tiles that were resized: each of its visual tokens is a sum of four

    def cells(self, height: int, width: int) -> int:
        """Cells of a patch row that a picture takes: its extra ones in whole groups of those that merge."""
        group = self.merge**2
        return height * width + (self.extra + group - 1) // group * group


def build_batch(slots: list[list[Document]], sizes: Sizes) -> dict[str, Tensor]:
    """Each slot's documents one after the other, each image in the first of its slot's rows where there is
    room.
    """
    B, S, L = len(slots), sizes.seq_len, sizes.patches_per_row
    N, C = B * sizes.patch_rows, sizes.patch_size**2 * 3
    batch = {
        "tokens": torch.zeros(B, S, dtype=torch.int64),
        "labels": torch.full((B, S), -100, dtype=torch.int64),
        "positions": torch.zeros(B, S, dtype=torch.int32),
        "document_ids": torch.full((B, S), -1, dtype=torch.int32),
        "pixel_values": torch.zeros(N, L, C, dtype=torch.uint8),
        "grid_thw": torch.full((N, L, 3), -1, dtype=torch.int32),
        "visual_index": torch.full((B, S), -1, dtype=torch.int64),
    }
    if sizes.mixed:
        batch["visual_taps"] = torch.full((B, S, 4), -1, dtype=torch.int64)
        batch["tap_weights"] = torch.zeros(B, S, 4)
    for b, documents in enumerate(slots):
        used, cursor = [0] * sizes.patch_rows, 0
        for d, document in enumerate(documents):
            tokens, visual = [], []
            for part in document:
                if isinstance(part, Picture):
                    index = _place(part, b, used, cursor + len(tokens), batch, sizes)
                    tokens += [IMAGE_ID] * len(index)
                    visual += index
                else:
                    tokens += part
                    visual += [-1] * len(part)
            span = slice(cursor, cursor + len(tokens))
            assert span.stop <= S, "the test's documents do not fit"
            batch["tokens"][b, span] = torch.tensor(tokens)
            batch["visual_index"][b, span] = torch.tensor(visual)
            batch["positions"][b, span] = torch.arange(len(tokens), dtype=torch.int32)
            batch["document_ids"][b, span] = d
            targets = [-100 if token == IMAGE_ID else token for token in tokens[1:]] + [-100]
            batch["labels"][b, span] = torch.tensor(targets)
            cursor = span.stop
    return batch


def pack_pictures(rows: list[list[Picture]], sizes: Sizes) -> tuple[Tensor, Tensor]:
    """One slot a row: pixels [N, L, C] and grid [N, L, 3]."""
    batch = build_batch([[[picture] for picture in row] for row in rows], sizes)
    return batch["pixel_values"], batch["grid_thw"]


def _place(
    picture: Picture, b: int, used: list[int], at: int, batch: dict[str, Tensor], sizes: Sizes
) -> list[int]:
    """Write the patches; return the indices of their visual tokens in the slot. `at`: its first token."""
    height, width = picture.size
    row = next(r for r, n in enumerate(used) if n + sizes.cells(height, width) <= sizes.patches_per_row)
    start, n = used[row], b * sizes.patch_rows + row
    for offset, (h, w) in enumerate(merge_order(height, width, sizes.merge)):
        batch["pixel_values"][n, start + offset] = picture.patches[h, w]
        batch["grid_thw"][n, start + offset] = torch.tensor([0, h, w])
    for number in range(sizes.extra):
        batch["grid_thw"][n, start + height * width + number] = torch.tensor([0, -2, -2])
    used[row] += sizes.cells(height, width)
    per_token = sizes.merge**2
    first = (row * sizes.patches_per_row + start) // per_token
    index = list(range(first, first + height * width // per_token))
    ends = [sizes.patch_rows * sizes.patches_per_row // per_token] * sizes.newline
    if sizes.mixed:
        span = slice(at, at + len(index) + len(ends))
        batch["visual_taps"][b, span] = torch.tensor(_taps(index) + [[end] * 4 for end in ends])
        batch["tap_weights"][b, span] = torch.tensor(WEIGHTS)
    return index + ends


WEIGHTS = (0.4, 0.3, 0.2, 0.1)  # of the taps of every visual token


def _taps(index: list[int]) -> list[list[int]]:
    """For each token its own place and the next three of its image, in a circle."""
    return [[index[(i + tap) % len(index)] for tap in range(4)] for i in range(len(index))]


def pad_for_transformers(pictures: list[Picture]) -> dict[str, torch.Tensor]:
    """One image a row, raster order, normalised as its processor does."""
    sizes = torch.tensor([picture.size for picture in pictures])
    longest = int(sizes.prod(1).max())
    pixels = torch.zeros(len(pictures), longest, pictures[0].patches.shape[-1])
    mask = torch.zeros(len(pictures), longest, dtype=torch.int64)
    for i, picture in enumerate(pictures):
        count = picture.size[0] * picture.size[1]
        pixels[i, :count] = (picture.patches.flatten(0, 1).float() / 255 - 0.5) / 0.5
        mask[i, :count] = 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": sizes}


def words(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(IMAGE_ID + 1, 96, (count,), generator=generator).tolist()


def example_slots(merge: int) -> list[list[Document]]:
    """Two slots; documents with several images of different shapes, with one, and with none."""
    m = merge
    return [
        [
            [
                words(5, 0),
                draw_picture(2 * m, 3 * m, 4, 0),
                words(4, 1),
                draw_picture(m, 5 * m, 4, 1),
                words(3, 2),
            ],
            [words(9, 3)],
            [draw_picture(4 * m, 2 * m, 4, 2), words(6, 4)],
        ],
        [[words(12, 5)], [words(2, 6), draw_picture(3 * m, 3 * m, 4, 3), words(7, 7)]],
    ]
