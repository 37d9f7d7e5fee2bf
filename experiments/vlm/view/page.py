"""Slots as one self-contained HTML page."""

import html
import json
from importlib.resources import files
from string import Template

import numpy as np

from experiments.vlm.batch import BatchShape, Delivered
from experiments.vlm.view.drawing import KIND_COLOURS, caption, colour, patch_strip, png, thumbnail
from experiments.vlm.view.slot_view import ImageView, Kind, SlotView
from torchtitan.components.tokenizer import Tokenizer


def make_page(
    slots: list[SlotView], shape: BatchShape, merge: int, tokenizer: Tokenizer, title: str, facts: str
) -> str:
    """The slots as one HTML page that loads nothing else; `facts`: a line under the title."""
    ids = sorted({int(token) for slot in slots for token in slot.tokens})
    return Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        facts=html.escape(facts),
        slots="\n".join(_section(number, slot, shape, merge, tokenizer) for number, slot in enumerate(slots)),
        names=_script({token: tokenizer.decode([token]) for token in ids}),
        merge=merge,
        data=_script([_data(slot) for slot in slots]),
        **{kind.name.lower(): name for kind, name in KIND_COLOURS.items()},
    )


def _script(value: object) -> str:
    """JSON that a script may hold, whatever a data set's text says."""
    return json.dumps(value).replace("<", "\\u003c")


def _data(slot: SlotView) -> dict:
    return {
        "tokens": slot.tokens.tolist(),
        "kinds": slot.kinds.tolist(),
        "documents": slot.document_ids.tolist(),
        "visual": slot.visual_index.tolist(),
        "images": [
            {"visual": i.visual, "h": i.h, "w": i.w, "colour": colour(n)} for n, i in enumerate(slot.images)
        ],
    }


def _section(number: int, slot: SlotView, shape: BatchShape, merge: int, tokenizer: Tokenizer) -> str:
    patches = shape.patch_rows * shape.patches_per_row
    bars = _bar("tokens", slot.token_occupancy, shape.seq_len) + _bar(
        "patches", slot.patch_occupancy, patches
    )
    strips = "".join(
        f'<img class="strip" alt="" src="{png(patch_strip(slot, row))}">' for row in range(shape.patch_rows)
    )
    figures = "".join(_figure(number, place, image, merge) for place, image in enumerate(slot.images))
    return f"""<section><h2>{slot.name}</h2>
<div class="bars">{bars}</div>
<h3>The sequence: {shape.seq_len} tokens, {len(slot.samples)} documents (red marks: where one begins)</h3>
<canvas id="tokens-{number}"></canvas>
<h3>The patches: {shape.patch_rows} x {shape.patches_per_row}, each in its mean colour, underlined in that of
its image</h3>{strips}
<h3>Its {slot.image_count} images, put together again from the patches</h3>
<div class="gallery">{figures}</div>
<h3>What the model reads</h3>
{"".join(_document(slot, sample, tokenizer) for sample in slot.samples)}</section>"""


def _figure(number: int, place: int, image: ImageView, merge: int) -> str:
    return f"""<figure id="image-{number}-{place}">
<div class="frame" style="border-color:{colour(place)}">
<img alt="" src="{png(image.pixels)}"><div class="spot"></div></div>
<figcaption>{caption(place, image, merge)}</figcaption></figure>"""


def _bar(name: str, share: float, of: int) -> str:
    filled = f'<div><b style="width:{share:.2%}"></b></div>'
    return f'<div class="bar">{filled}<small>{name}: {share:.1%} of {of}</small></div>'


def _document(slot: SlotView, sample: Delivered, tokenizer: Tokenizer) -> str:
    """Its text, with its images where their placeholders stand; text without loss in grey."""
    places = np.flatnonzero(slot.document_ids == sample.document)
    starts = {image.tokens[0]: number for number, image in enumerate(slot.images)}
    parts = []
    for run in np.split(places, np.flatnonzero(np.diff(slot.kinds[places])) + 1):
        kind = slot.kinds[run[0]] if len(run) else Kind.PADDING
        if kind == Kind.IMAGE:
            number = starts[int(run[0])]
            parts.append(
                f'<img alt="image {number}" style="border-color:{colour(number)}" '
                f'src="{png(thumbnail(slot.images[number]))}">'
            )
        elif kind in (Kind.TARGET, Kind.CONTEXT):
            text = html.escape(tokenizer.decode(slot.tokens[run].tolist()))
            parts.append(text if kind == Kind.TARGET else f'<span class="quiet">{text}</span>')
    sizes = ", ".join(f"{height} x {width}" for height, width in sample.image_sizes)
    piece = f", from token {sample.offset}" if sample.offset else ""
    where = f"{sample.source}, {sample.shard}, key {sample.key}"
    origin = f"document {sample.document}{piece}: {where}, {len(places)} tokens"
    images = f"; images of {sizes} pixels before resizing" if sizes else ""
    heading = f"<small>{html.escape(origin + images)}</small>"
    return f'<div class="document" style="border-color:#cfd6db">{heading}{"".join(parts)}</div>'
