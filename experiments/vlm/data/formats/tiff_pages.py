"""The pages of a TIFF by their headers: each is an image, and one file may hold all images of a document.

A TIFF is a header that leads to the first page's tags, and those lead to the next page's (TIFF 6.0; BigTIFF
with numbers of 8 bytes). Leading the header to another page makes that the first: the one decoders show.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from experiments.vlm.data.rejects import Rejected

MOST_PAGES = 4096
WIDTH, HEIGHT, ORIENTATION = 256, 257, 274  # tags
SHORT, LONG = 3, 4  # types of their values

Read = Callable[[int, int], bytes]  # (offset, count); raises Rejected


class Page(NamedTuple):
    """One image of a TIFF."""

    tags: int  # where they begin
    height: int  # as it is shown
    width: int


class _Layout(NamedTuple):
    order: Literal["little", "big"]
    offset: int  # bytes of an offset
    total: int  # bytes of the number of tags
    tag: int  # bytes of a tag

    def number(self, data: bytes) -> int:
        return int.from_bytes(data, self.order)


def is_tiff(extension: str) -> bool:
    """By its name."""
    return extension.rpartition(".")[2] in ("tif", "tiff")


def pages(read: Read) -> list[Page]:
    """The pages of the TIFF whose bytes `read` gives. Raises Rejected where it is none or leads astray."""
    layout = _layout(read(0, 4))
    place = layout.number(read(layout.offset, layout.offset))
    found: list[Page] = []
    seen: set[int] = set()
    while place:
        if place in seen or len(found) == MOST_PAGES:
            raise Rejected("image_undecodable", f"page {len(found)} of the TIFF leads back to an earlier one")
        seen.add(place)
        count = layout.number(read(place, layout.total))
        tags = read(place + layout.total, count * layout.tag)
        found.append(
            _page(layout, place, [tags[i : i + layout.tag] for i in range(0, len(tags), layout.tag)])
        )
        place = layout.number(read(place + layout.total + len(tags), layout.offset))
    return found


def only(data: bytes, tags: int) -> bytes:
    """A TIFF whose first page is the one with these tags."""
    layout = _layout(data[:4])
    return b"".join(
        [data[: layout.offset], tags.to_bytes(layout.offset, layout.order), data[2 * layout.offset :]]
    )


def _layout(magic: bytes) -> _Layout:
    order: dict[bytes, Literal["little", "big"]] = {b"II": "little", b"MM": "big"}
    version = magic[2:].strip(b"\0")
    if magic[:2] not in order or version not in (b"*", b"+"):
        raise Rejected("image_undecodable", "it is no TIFF")
    return _Layout(order[magic[:2]], *((4, 2, 12) if version == b"*" else (8, 8, 20)))


def _page(layout: _Layout, place: int, tags: list[bytes]) -> Page:
    values = {}
    for tag in tags:
        kind = layout.number(tag[2:4])
        if kind in (SHORT, LONG):
            values[layout.number(tag[:2])] = layout.number(
                tag[4 + layout.offset :][: 2 if kind == SHORT else 4]
            )
    if not (values.get(WIDTH) and values.get(HEIGHT)):
        raise Rejected("image_undecodable", f"the page at byte {place} of the TIFF has no size")
    is_turned = 5 <= values.get(ORIENTATION, 1) <= 8
    sides = values[HEIGHT], values[WIDTH]
    return Page(place, *(sides[::-1] if is_turned else sides))
