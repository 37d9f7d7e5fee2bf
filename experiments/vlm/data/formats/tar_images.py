"""Which images of its sample a record of a tar means, and which it leaves out.

"7.0.jpg", "d/7.0.jpg", "0.jpg"    a member, by its name with or without folders (also others) and key
"page_3_image_85"                  a page of the sample's TIFF, as in MINT-1T: one for each entry of the
                                   record's `image_metadata`, or else of its `images` where these are as many

A sample may hold more images than its record has places for. None is dropped in silence: each that is left
out is a reject of its own, `image_unplaced`.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from experiments.vlm.data.document import Draft, ImageValue
from experiments.vlm.data.formats.image_values import held_bytes, is_image_name
from experiments.vlm.data.formats.tar_header import Member
from experiments.vlm.data.formats.tiff_pages import Page, is_tiff
from experiments.vlm.data.rejects import Rejected

NAMES = ("path", "image_name", "url", "raw_url")  # fields that may say what the member of an image is called


class PageOf(NamedTuple):
    """A page of a member that is a TIFF."""

    member: Member
    page: Page


def resolve(draft: Draft, images: "SampleImages", all_count: bool) -> None:
    """Put what a draft means in place of names. `all_count`: images that stand nowhere are rejects."""
    values = [image.value for image in draft.images()]
    all_seen = any(isinstance(value, Member) for value in values)
    if values == images.members and not images.tiff:
        return  # as nearly always
    draft.parts = [images.find(part) if isinstance(part, ImageValue) else part for part in draft.parts]
    if all_count:
        draft.rejects = draft.rejects + images.unplaced(draft, all_seen)


class SampleImages:
    """The images of one sample."""

    def __init__(
        self,
        members: Sequence[Member],
        record: Mapping[str, Any],
        pages_of: Callable[[Member], list[Page]],
    ):
        """pages_of: raises Rejected."""
        self.all = members
        self.members = [member for member in members if is_image_name(member.extension)]
        self.record = record
        self.pages_of = pages_of
        tiffs = [member for member in self.members if is_tiff(member.extension)]
        self.tiff = tiffs[0] if len(tiffs) == 1 else None
        self.asked: Counter[str] = Counter()

    @cached_property
    def borne(self) -> dict[str, Member]:
        """By their names."""
        return {name: member for member in self.all for name in _names(member)}

    def find(self, image: ImageValue) -> ImageValue:
        """With the Member or PageOf that it means in place of a name; a Rejected where there is none."""
        value = image.value
        if isinstance(value, Member):
            return image
        try:
            if (held := held_bytes(value)) is not None:
                return ImageValue(held, image.position)
            names = [value.get(key) for key in NAMES] if isinstance(value, dict) else [value]
            name = next((name for name in names if name and isinstance(name, str)), "")
            found = self.borne.get(_plain(name)) or self._page(name)
            found = found or self.borne.get(os.path.basename(_plain(name)))
        except Rejected as rejected:
            return ImageValue(rejected, image.position)
        missing = Rejected("image_missing", f"no member {name[:200]} in the sample")
        return ImageValue(found or missing, image.position)

    def unplaced(self, draft: Draft, all_seen: bool) -> list[Rejected]:
        """Images that stand nowhere in a draft. all_seen: the format has said which it left out."""
        used = [image.value for image in draft.images()]
        named = set() if all_seen else {_plain(text) for text in _strings(self.record)}
        left = list(self._pages_left(used))
        for member in self.members if not all_seen else ():
            of_pages = any(isinstance(value, PageOf) and value.member == member for value in used)
            if member not in used and not of_pages and not named & _names(member):
                left.append(f"{member.extension}: the record has no place for it")
        first = len(used) + len(draft.rejects)
        return [Rejected("image_unplaced", what, image=number) for number, what in enumerate(left, first)]

    def _page(self, name: str) -> PageOf | None:
        """The page of that name; where several have it, each in its turn. Raises Rejected."""
        if self.tiff is None:
            return None
        pages = self.pages_of(self.tiff)
        numbers = [number for number, own in enumerate(self._page_names(name, len(pages))) if own == name]
        if not numbers:
            return None
        number = numbers[min(self.asked[name], len(numbers) - 1)]
        self.asked[name] += 1
        if number >= len(pages):
            raise Rejected(
                "image_missing", f"{name} is page {number} of {len(pages)} of {self.tiff.extension}"
            )
        return PageOf(self.tiff, pages[number])

    def _page_names(self, name: str, count: int) -> list[Any]:
        """What a record of MINT-1T calls the pages of its TIFF, in their order.

        By the list of images where that has as many as there are pages, and no member bears one of its names.
        """
        metadata, images = self.record.get("image_metadata"), self.record.get("images")
        entries = [one for one in metadata if isinstance(one, dict)] if isinstance(metadata, list) else []
        names = [f"page_{entry.get('page')}_image_{entry.get('xref')}" for entry in entries]
        if name in names or not isinstance(images, list):
            return names
        listed = [one for one in images if one is not None]
        is_of_members = any(isinstance(one, str) and _plain(one) in self.borne for one in listed)
        return listed if len(listed) == count and not is_of_members else []

    def _pages_left(self, used: Sequence[Any]) -> Iterator[str]:
        """The unused pages of a TIFF that is used. By itself a TIFF shows its first page."""
        shown = {value.page for value in used if isinstance(value, PageOf)}
        if self.tiff is None or not (shown or self.tiff in used):
            return
        try:
            pages = self.pages_of(self.tiff)
        except Rejected:
            return  # rejected where the image is read
        for number, page in enumerate(pages):
            if page not in (shown or {pages[0]}):
                yield f"page {number} of {len(pages)} of {self.tiff.extension}: no place for it"


def _names(member: Member) -> set[str]:
    return {own.lower() for own in (member.extension, os.path.basename(member.name), member.name)}


def _plain(name: str) -> str:
    return name.removeprefix("./").lower()


def _strings(value: Any) -> Iterator[str]:
    """All texts in what JSON can hold."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)
