"""Slots as one PNG: the sequence, the row of patches, the images put together again, and the first words."""

import textwrap
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, FigureBase
from matplotlib.gridspec import SubplotSpec
from matplotlib.patches import Patch

from experiments.vlm.batch import BatchShape
from experiments.vlm.view.drawing import KIND_COLOURS, colour, patch_strip
from experiments.vlm.view.slot_view import Kind, SlotView
from torchtitan.components.tokenizer import Tokenizer

COLUMNS = 128  # tokens in a line
NAMES = {
    Kind.TARGET: "text with loss, and its end",
    Kind.CONTEXT: "text without loss",
    Kind.BOUNDARY: "bos, begin and end of image",
    Kind.PADDING: "padding",
}
TITLE_LETTERS = 150  # in a line
SHOWN_IMAGES = 12
SHOWN_LETTERS = 900


def draw_slots(
    slots: list[SlotView], shape: BatchShape, tokenizer: Tokenizer, title: str, out: str | BinaryIO
) -> None:
    """Writes a PNG of the slots, one below the other, with a legend of their colours."""
    # Without pyplot, whose backend a notebook has chosen for its own figures.
    figure = Figure(figsize=(15, 6.2 * len(slots) + 0.8), layout="constrained")
    figure.suptitle("\n".join(textwrap.fill(line, TITLE_LETTERS) for line in title.splitlines()), fontsize=13)
    handles = [
        Patch(facecolor=KIND_COLOURS[kind], edgecolor="#888", label=name) for kind, name in NAMES.items()
    ]
    handles.append(Patch(color=colour(0), label="placeholders, in the colour of their image"))
    parts = figure.subfigures(len(slots) + 1, 1, squeeze=False, height_ratios=[*[6.2] * len(slots), 0.4])[
        :, 0
    ]
    for part, slot in zip(parts, slots, strict=False):
        _draw_slot(part, slot, shape, tokenizer)
    parts[-1].legend(handles=handles, loc="center", ncols=len(handles))
    figure.savefig(out, dpi=80, format="png")


def _draw_slot(part: FigureBase, slot: SlotView, shape: BatchShape, tokenizer: Tokenizer) -> None:
    part.suptitle(
        f"{slot.name}: {slot.token_occupancy:.1%} of {shape.seq_len} tokens, "
        f"{slot.patch_occupancy:.1%} of "
        f"{shape.patch_rows} x {shape.patches_per_row} patches, {len(slot.samples)} documents, "
        f"{slot.image_count} images",
        fontsize=11,
    )
    rows = part.add_gridspec(4, 1, height_ratios=[2, 1.2, 3, 1.4])
    _draw_tokens(part.add_subplot(rows[0]), slot)
    axes = part.add_subplot(rows[1])
    strips = np.concatenate([np.asarray(patch_strip(slot, row)) for row in range(shape.patch_rows)])
    axes.imshow(strips, aspect="auto", interpolation="nearest")
    _bare(axes, "patches, in lines of 256")
    _draw_images(part, rows[2], slot)
    axes = part.add_subplot(rows[3])
    axes.text(0, 1, textwrap.fill(_words(slot, tokenizer), 190), va="top", fontsize=7.5, family="monospace")
    axes.set_axis_off()


def _words(slot: SlotView, tokenizer: Tokenizer) -> str:
    """The beginning of the text, an image by its number."""
    images = {image.tokens[0]: f"[image {number}]" for number, image in enumerate(slot.images)}
    parts = []
    for run in np.split(np.arange(len(slot.tokens)), np.flatnonzero(np.diff(slot.kinds)) + 1):
        if slot.kinds[run[0]] in (Kind.TARGET, Kind.CONTEXT):
            parts.append(tokenizer.decode(slot.tokens[run].tolist()))
        elif run[0] in images:
            parts.append(images[run[0]])
    words = " ".join(" ".join(parts).split()).replace("$", r"\$")
    return words[:SHOWN_LETTERS] + ("..." if len(words) > SHOWN_LETTERS else "")


def _draw_tokens(axes: Axes, slot: SlotView) -> None:
    lines = -(-len(slot.tokens) // COLUMNS)
    cells = np.ones((lines * COLUMNS, 3))
    for kind, name in KIND_COLOURS.items():
        cells[: len(slot.tokens)][slot.kinds == kind] = to_rgb(name)
    for number, image in enumerate(slot.images):
        cells[slice(*image.tokens)] = to_rgb(colour(number))
    axes.imshow(cells.reshape(lines, COLUMNS, 3), aspect="auto", interpolation="nearest")
    for place in np.flatnonzero(np.diff(slot.document_ids, prepend=-1)):
        axes.plot(
            [place % COLUMNS - 0.5] * 2,
            [place // COLUMNS - 0.5, place // COLUMNS + 0.5],
            color="#d11",
            lw=1.6,
        )
    _bare(axes, f"tokens, in lines of {COLUMNS}; red: a document begins")


def _draw_images(part: FigureBase, place: SubplotSpec, slot: SlotView) -> None:
    shown = slot.images[:SHOWN_IMAGES]
    grid = place.subgridspec(1, max(1, len(shown)))
    for number, image in enumerate(shown):
        axes = part.add_subplot(grid[number])
        axes.imshow(image.pixels)
        _bare(axes, f"image {number}: {image.h} x {image.w}", size=7)
        for spine in axes.spines.values():
            spine.set(color=colour(number), linewidth=3, visible=True)


def _bare(axes: Axes, title: str, size: float = 8.5) -> None:
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=size, loc="left")
    for spine in axes.spines.values():
        spine.set_visible(False)
