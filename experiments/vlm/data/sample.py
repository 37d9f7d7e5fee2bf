"""A document as the model will read it: token ids, which of them are targets, and where its images go.

In: a Document, whose images are references with their sizes in pixels. Out: a Sample; no image has been
decoded.

    document      [bos] parts [eos]      without bos where the tokenizer has none
    conversation  parts                  its chat template writes where it begins and ends
    image         what its plan says (image_plan.py), such as begin_image, image * visual tokens, end_image
    target        a token that is to be predicted from the one before it. Text is, and eos; bos, image tokens
                  and texts without loss (a user's turn) are not. So the first text token after an image is

A document that does not fit a slot is a sample all the same, and leaves in pieces (split.py): bos stands in
the first alone, eos in the last.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from experiments.vlm.data.document import BOS, EOS, Document, Image, Part, Special, Text
from experiments.vlm.data.image_layout import BEGIN, END, Layout
from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.data.split import Outline
from torchtitan.components.tokenizer import Tokenizer


@dataclass(frozen=True)
class PlannedImage:
    """An image's place among the tokens, and what becomes of it."""

    start: int  # its first token is this one of the sample
    number: int  # among the images of its document
    layout: Layout
    image: Image

    @property
    def end(self) -> int:
        """The token behind its last."""
        return self.start + len(self.layout.tokens)


@dataclass(frozen=True)
class Sample:
    """A document, or a piece of one."""

    tokens: np.ndarray  # int32 [t]
    targets: np.ndarray  # bool [t]
    images: list[PlannedImage] = field(default_factory=list)
    parts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))  # tokens at which a part begins

    @property
    def length(self) -> int:
        """Tokens, those of images included."""
        return len(self.tokens)

    @cached_property
    def outline(self) -> Outline:
        """The sample as the planner sees it."""
        starts = np.array([image.start for image in self.images], np.int64)
        ends = np.array([image.end for image in self.images], np.int64)
        views = [[view.cells for view in image.layout.views] for image in self.images]
        return Outline(self.length, starts, ends, views, self.parts)

    def piece(self, start: int, end: int) -> "Sample":
        """The tokens [start, end), without copying them. Images lie inside or outside, never across."""
        if (start, end) == (0, self.length):
            return self
        images = [
            replace(image, start=image.start - start) for image in self.images if start <= image.start < end
        ]
        return Sample(self.tokens[start:end], self.targets[start:end], images)


class Atom(NamedTuple):
    """A part of a document in token space."""

    tokens: Sequence[int]
    targets: Sequence[bool]
    image: PlannedImage | None = None  # as if it began at token 0


def make_sample(document: Document, tokenizer: Tokenizer, plan: ImagePlan) -> Sample:
    """The whole document, however long."""
    atoms = list(encode(document, tokenizer, plan))
    starts = list(itertools.accumulate((len(atom.tokens) for atom in atoms[:-1]), initial=0))
    return Sample(
        tokens=np.fromiter(itertools.chain.from_iterable(atom.tokens for atom in atoms), np.int32),
        targets=np.fromiter(itertools.chain.from_iterable(atom.targets for atom in atoms), bool),
        images=[
            replace(atom.image, start=start) for start, atom in zip(starts, atoms, strict=True) if atom.image
        ],
        parts=np.array(starts, np.int64),
    )


def encode(document: Document, tokenizer: Tokenizer, plan: ImagePlan) -> Iterator[Atom]:
    """The parts as tokens; bos and eos are atoms of their own."""
    if tokenizer.bos_id is not None and not document.conversation:
        yield Atom([tokenizer.bos_id], [False])
    numbers, alone = itertools.count(), sum(isinstance(part, Image) for part in document.parts) == 1
    parts = (known(part, tokenizer) for part in document.parts)
    for _, group in itertools.groupby(parts, key=type):
        texts: list[Text] = []
        for part in group:
            if isinstance(part, Text):
                texts.append(part)
            elif isinstance(part, Image):
                layout = plan.layout(part.height, part.width, alone)
                yield encode_image(part, tokenizer, layout, next(numbers))
            else:
                yield encode_special(part, tokenizer)
        if texts:
            yield encode_text(texts, tokenizer)
    if not document.conversation:
        yield Atom([tokenizer.eos_id], [True])


def known(part: Part, tokenizer: Tokenizer) -> Part:
    """The part; the text of its spelling where it is a special token that the tokenizer does not know."""
    if not isinstance(part, Special) or part.spelling in (BOS, EOS):
        return part
    unknown = tokenizer.special_id(part.spelling) is None
    return Text(part.spelling, part.loss) if unknown else part


def encode_text(texts: list[Text], tokenizer: Tokenizer) -> Atom:
    """Neighbouring texts, tokenised as one: a token carries loss if any of its characters does."""
    joined = "".join(text.text for text in texts)
    if len({text.loss for text in texts}) == 1:
        ids = tokenizer.encode(joined)  # no offsets needed: twice as fast
        return Atom(ids, [texts[0].loss] * len(ids))
    ids, spans = tokenizer.encode_with_offsets(joined)
    carries = [text.loss for text in texts for _ in text.text]
    return Atom(ids, [any(carries[start:end]) for start, end in spans])


def encode_image(image: Image, tokenizer: Tokenizer, layout: Layout, number: int) -> Atom:
    """The tokens that stand for an image, none of them a target. `number`: among its document's images."""
    ids = np.full(len(layout.tokens), tokenizer.image_id)
    ids[layout.tokens == BEGIN] = tokenizer.begin_image_id
    ids[layout.tokens == END] = tokenizer.end_image_id
    return Atom(ids.tolist(), [False] * len(ids), PlannedImage(0, number, layout, image))


def encode_special(part: Special, tokenizer: Tokenizer) -> Atom:
    """A special token that the tokenizer knows; no token for a bos that it does not have."""
    own = {BOS: tokenizer.bos_id, EOS: tokenizer.eos_id}
    id = own[part.spelling] if part.spelling in own else tokenizer.special_id(part.spelling)
    return Atom([], []) if id is None else Atom([id], [part.loss])
