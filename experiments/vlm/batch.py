"""The batch contract, as one table.

A slot is one row of S tokens and the `patch_rows` rows of L patches that hold its images: N = B * patch_rows,
and patch rows b * patch_rows ... belong to token row b. Every shape is fixed for a run. Letters: B slots,
S tokens, N patch rows, L patches a row, D values a patch (patch_size * patch_size * 3), T the three of t, h,
w, K taps.

The loader allocates from this table, context parallel slices the S dims, pipeline parallel chunks the B and N
dims.

`visual_index` numbers the visual tokens of a slot, patch_rows * L / spatial_merge_size^2 of them, and behind
these the projector's own (a newline). Where an image plan resizes visual tokens, each is a weighted sum: only
then a batch has `visual_taps`, numbers of the same kind (the first is that of visual_index), and
`tap_weights`.

A batch at B = 1, S = 16 and L = 16, with patches of 16 pixels and spatial_merge_size = 2: one document of two
images, 32 x 32 and 32 x 64 pixels, and the text "cats!". < and > are begin and end of an image, v is a visual
token, - in the labels -100. The patches of a visual token lie next to each other, as grid_thw shows (h,w
here; t is 0, on padding -1).

    tokens       bos   <   v   >   <   v   v   >   c   a   t   s   ! eos pad pad
    labels         -   -   -   -   -   -   -   c   a   t   s   ! eos   -   -   -
    positions      0   1   2   3   4   5   6   7   8   9  10  11  12  13   0   0
    document_ids   0   0   0   0   0   0   0   0   0   0   0   0   0   0  -1  -1
    visual_index  -1  -1   0  -1  -1   1   2  -1  -1  -1  -1  -1  -1  -1  -1  -1
    source_ids     0   0   0   0   0   0   0   0   0   0   0   0   0   0  -1  -1
    grid_thw     0,0 0,1 1,0 1,1 0,0 0,1 1,0 1,1 0,2 0,3 1,2 1,3   -   -   -   -

    tokens ... source_ids [1, 16]    pixel_values [1, 16, 768]    grid_thw [1, 16, 3]

Where an encoder has a class token and registers, each image has a cell for each of them behind its patches,
with t = 0 and h = w = -2, and padding up to a multiple of spatial_merge_size squared, since so many cells
merge. With five of them the second image would begin at patch 12: behind 0,0 0,1 1,0 1,1, five cells -2,-2
and three of padding.

A second document would begin at place 14 with document id 1 and position 0, its images at patch 12.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

IGNORE = -100  # the label of a token without loss
TAPS = 4  # visual tokens in the weighted sum that a resized one is
EXTRA = -2  # h and w of the cells of class token and registers


class Field(NamedTuple):
    """One tensor of a batch."""

    dtype: str  # numpy and torch share these names
    dims: str  # one letter a dimension
    padding: int  # the value where there is nothing


FIELDS = {
    "tokens": Field("int64", "BS", 0),  # padding value: the pad id of the tokenizer, see `padding_value`
    "labels": Field("int64", "BS", IGNORE),
    "positions": Field("int32", "BS", 0),
    "document_ids": Field("int32", "BS", -1),
    "pixel_values": Field("uint8", "NLD", 0),
    "grid_thw": Field("int32", "NLT", -1),
    "visual_index": Field("int64", "BS", -1),
    "source_ids": Field("int32", "BS", -1),  # which of the split's sources, in the order of the job
    "visual_taps": Field("int64", "BSK", -1),
    "tap_weights": Field("float32", "BSK", 0),
}
OPTIONAL = ("visual_taps", "tap_weights")
PLACING = ("visual_index", *OPTIONAL)  # which visual tokens a token is made of


@dataclass(frozen=True)
class BatchShape:
    """Sizes of one batch. `of` gives the shape of a field."""

    slots: int
    seq_len: int
    patch_rows: int
    patches_per_row: int
    patch_size: int
    taps: bool = False  # with the fields of OPTIONAL

    @property
    def fields(self) -> dict[str, Field]:
        """The fields that a batch has, in the order of FIELDS."""
        return {name: field for name, field in FIELDS.items() if self.taps or name not in OPTIONAL}

    def of(self, name: str) -> tuple[int, ...]:
        """The shape of a field of FIELDS."""
        sizes = {
            "B": self.slots,
            "S": self.seq_len,
            "N": self.slots * self.patch_rows,
            "L": self.patches_per_row,
            "D": self.patch_size * self.patch_size * 3,
            "T": 3,
            "K": TAPS,
        }
        return tuple(sizes[letter] for letter in FIELDS[name].dims)


@dataclass
class Delivered:
    """One sample (or piece of a long one) as it reached a slot; for reports, validation and inspection.

    Plain data.
    """

    row: int  # token row inside the batch
    document: int  # its value in document_ids
    source: str
    shard: str
    key: str
    # (height, width) in pixels before resizing
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    # where in its document it begins, in tokens: above 0 in later pieces of one too long for a slot
    offset: int = 0


@dataclass
class Batch:
    """One microbatch. `tensors` follows FIELDS; `counts` (data/batch_metrics.py) are host integers, so that
    nothing asks the device for them. `epochs`: the share of these slots in how often each source was
    delivered so far.
    """

    tensors: dict
    counts: dict[str, int]
    samples: list[Delivered]
    epochs: dict[str, float] = field(default_factory=dict)
