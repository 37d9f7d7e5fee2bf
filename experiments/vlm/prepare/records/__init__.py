"""What a row of the input is, and what it becomes in a shard. One file for each kind, one line here.

parse(row, sources) -> Record        raises Rejected where the row has not the shape of its kind
members(record, key, pictures)       member name -> bytes; None in place of a picture that could not be had.
                                     Raises Rejected where nothing worth keeping is left
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from experiments.vlm.data.rejects import Rejected
from experiments.vlm.prepare.records import captions, conversations, documents
from experiments.vlm.prepare.records.record import Members, Pictures, Record, Sources

__all__ = ["KINDS", "Kind", "Record", "Rejected", "Sources", "kind_of"]


class Kind(NamedTuple):
    parse: Callable[[Mapping, Sources], Record]
    members: Callable[[Record, str, Pictures], Members]
    fits: Callable[[Mapping], bool]  # may this row be one of the kind?
    distinct: bool  # by default an image is kept once in the whole data set


KINDS = {
    "conversations": Kind(conversations.parse, conversations.members, conversations.fits, distinct=False),
    "documents": Kind(documents.parse, documents.members, documents.fits, distinct=True),
    "captions": Kind(captions.parse, captions.members, captions.fits, distinct=True),
}


def kind_of(row: Mapping) -> str | None:
    """The first kind that fits."""
    return next((name for name, kind in KINDS.items() if kind.fits(row)), None)
