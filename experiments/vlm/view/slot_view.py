"""One slot of a batch, read back from its tensors alone, for people to look at.

Nothing here knows what the loader meant to do: images are found where h and w are 0, and put together again
from their patches.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from einops import rearrange

from experiments.vlm.batch import Batch, BatchShape, Delivered
from torchtitan.components.tokenizer import Tokenizer


class Kind(IntEnum):
    """What a token is. Numbers are indices of the colours."""

    PADDING = 0
    TARGET = 1  # text that the model learns to write, and its end
    CONTEXT = 2  # text without loss
    BOUNDARY = 3  # bos, begin and end of image
    IMAGE = 4


@dataclass
class ImageView:
    """An image as it lies in a slot."""

    pixels: np.ndarray  # uint8 [H, W, 3], from the patches
    row: int  # of patches
    first: int  # patch of that row
    h: int  # patches
    w: int
    visual: int  # its first visual token among those of the slot
    tokens: tuple[int, int]  # the placeholders [start, end) that point at it; (-1, -1): none does
    document: int


@dataclass
class SlotView:
    """One slot of a batch, taken apart for people."""

    step: int  # 0: not known, and `slot` is the row of a batch
    slot: int
    tokens: np.ndarray  # int64 [S]
    kinds: np.ndarray  # Kind [S]
    document_ids: np.ndarray  # int32 [S]
    visual_index: np.ndarray  # int64 [S]
    patch_rows: list[np.ndarray]  # float [L, 3] each: the mean colour of each patch, NaN where there is none
    images: list[ImageView]  # each view of one, where an image has several
    samples: list[Delivered]

    @property
    def name(self) -> str:
        """Its name in titles."""
        return f"step {self.step}, slot {self.slot}" if self.step else f"slot {self.slot}"

    @property
    def image_count(self) -> int:
        """Images of its samples."""
        return sum(len(sample.image_sizes) for sample in self.samples)

    @property
    def token_occupancy(self) -> float:
        """Share of the row's tokens that are not padding."""
        return float((self.document_ids >= 0).mean())

    @property
    def patch_occupancy(self) -> float:
        """Share of the slot's patches that are not padding."""
        return float(np.mean([~np.isnan(row[:, 0]) for row in self.patch_rows]))


def read_slot(
    batch: Batch, row: int, step: int, slot: int, shape: BatchShape, merge: int, tokenizer: Tokenizer
) -> SlotView:
    """Row `row` of the batch."""
    tensors = {name: tensor.numpy() for name, tensor in batch.tensors.items()}
    patch_rows = slice(row * shape.patch_rows, (row + 1) * shape.patch_rows)
    tokens, document_ids = tensors["tokens"][row], tensors["document_ids"][row]
    visual_index, labels = tensors["visual_index"][row], tensors["labels"][row]
    pixels, grid = tensors["pixel_values"][patch_rows], tensors["grid_thw"][patch_rows]
    images = [
        _read_image(
            pixels[number], grid[number], number, int(first), merge, shape, visual_index, document_ids
        )
        for number in range(shape.patch_rows)
        for first in np.flatnonzero((grid[number][:, 1:] == 0).all(-1))
    ]
    return SlotView(
        step=step,
        slot=slot,
        tokens=tokens.copy(),
        kinds=_kinds(tokens, labels, document_ids, visual_index, tokenizer),
        document_ids=document_ids.copy(),
        visual_index=visual_index.copy(),
        patch_rows=[_mean_colours(pixels[number], grid[number]) for number in range(shape.patch_rows)],
        images=images,
        samples=[sample for sample in batch.samples if sample.row == row],
    )


def _read_image(
    pixels: np.ndarray,
    grid: np.ndarray,
    row: int,
    first: int,
    merge: int,
    shape: BatchShape,
    visual_index: np.ndarray,
    document_ids: np.ndarray,
) -> ImageView:
    later = np.flatnonzero((grid[first + 1 :, 1:] <= 0).all(-1))  # the next image, or padding
    end = first + 1 + int(later[0]) if len(later) else len(grid)
    h, w = (int(side) + 1 for side in grid[first:end, 1:].max(axis=0))
    visual = (row * shape.patches_per_row + first) // merge**2
    placed = np.flatnonzero((visual_index >= visual) & (visual_index < visual + h * w // merge**2))
    span = (int(placed[0]), int(placed[-1]) + 1) if len(placed) else (-1, -1)
    document = int(document_ids[span[0]]) if len(placed) else -1
    return ImageView(
        unpatchify(pixels[first:end], grid[first:end], shape.patch_size),
        row,
        first,
        h,
        w,
        visual,
        span,
        document,
    )


def unpatchify(patches: np.ndarray, grid: np.ndarray, patch_size: int) -> np.ndarray:
    """uint8 [n, D] and (t, h, w) [n, 3] -> uint8 [H, W, 3]. A place that no patch names stays black."""
    h, w = grid[:, 1:].max(axis=0) + 1
    image = np.zeros((h, w, patches.shape[1]), np.uint8)
    image[grid[:, 1], grid[:, 2]] = patches
    return rearrange(image, "h w (ph pw c) -> (h ph) (w pw) c", ph=patch_size, pw=patch_size)


def _kinds(
    tokens: np.ndarray,
    labels: np.ndarray,
    document_ids: np.ndarray,
    visual_index: np.ndarray,
    tokenizer: Tokenizer,
) -> np.ndarray:
    kinds = np.full(len(tokens), Kind.CONTEXT)
    marks = tokenizer.bos_id, tokenizer.eos_id, tokenizer.begin_image_id, tokenizer.end_image_id
    boundaries = [id for id in marks if id is not None]
    kinds[np.isin(tokens, boundaries)] = Kind.BOUNDARY
    kinds[1:][labels[:-1] >= 0] = Kind.TARGET  # eos too
    kinds[visual_index >= 0] = Kind.IMAGE
    kinds[document_ids < 0] = Kind.PADDING
    return kinds


def _mean_colours(pixels: np.ndarray, grid: np.ndarray) -> np.ndarray:
    colours = pixels.reshape(len(pixels), -1, 3).mean(axis=1)
    colours[grid[:, 0] < 0] = np.nan
    return colours
