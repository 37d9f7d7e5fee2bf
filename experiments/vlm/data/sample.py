"""A document as the model will read it: token ids, which of them are targets, and where its images go.

    document   [bos] parts [eos]         an image: begin_image, image * (h * w / merge^2), end_image
    target     a token that is to be predicted from the one before it. Text is, and eos; bos, image tokens and texts
               without loss (a user's turn) are not. So the first text token after an image is a target

A document that does not fit a slot is cut where parts meet; a text longer than a slot is cut inside. Pieces are documents of
their own, and joined give the document again: bos stands in the first alone, eos in the last.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import numpy as np

from experiments.vlm.data.document import Document, Image, Special, Text, encode_texts
from experiments.vlm.data.packing import Budget
from torchtitan.components.tokenizer import Tokenizer

GOAL = 2 / 3  # of a slot, at most, for pieces of documents with images
TEXT_RATIO = 0.5  # slots with fewer patches a token are for text
DENSE = 0.8  # of a sample that is nearly all image, the share of its tokens that are visual
MOST_PARTS = 4  # of a slot, that a long text is cut into


class Grid(Protocol):
    """The part of ImagePlan that planning needs: sizes in patches from sizes in pixels."""

    @property
    def merge_size(self) -> int: ...

    def grid(self, height: int, width: int) -> tuple[int, int]: ...


@dataclass(frozen=True)
class PlannedImage:
    start: int  # its begin_image is this token of the sample; its visual tokens follow
    number: int  # among the images of its document
    h: int  # patches
    w: int
    image: Image

    @property
    def patches(self) -> int:
        return self.h * self.w


@dataclass
class Sample:
    """A document, or a piece of one."""

    tokens: np.ndarray  # int32 [t]
    targets: np.ndarray  # bool [t]
    images: list[PlannedImage] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.tokens)

    @cached_property
    def image_patches(self) -> list[int]:
        return [image.patches for image in self.images]

    @cached_property
    def patches(self) -> int:
        return sum(self.image_patches)


class Atom(NamedTuple):
    """A part of a document in token space. Text may be cut anywhere, an image nowhere."""

    tokens: Sequence[int]
    targets: Sequence[bool]
    image: Image | None = None
    h: int = 0
    w: int = 0
    number: int = 0  # of the image among those of the document

    @property
    def patches(self) -> int:
        return self.h * self.w

    def chunks(self, first: int, later: int) -> list["Atom"]:
        """Of a text: the first so long (none if it would be empty), the later ones so."""
        starts = [*([0] if first > 0 else []), *range(max(0, first), len(self.tokens), later)]
        return [Atom(self.tokens[i:j], self.targets[i:j]) for i, j in zip(starts, [*starts[1:], len(self.tokens)], strict=True)]


def plan_samples(
    document: Document, tokenizer: Tokenizer, plan: Grid, budget: Budget, long: Literal["split", "truncate", "drop"] = "split"
) -> list[Sample]:
    """The document as samples that each fit an empty slot: one, or several pieces in order; none if it is dropped."""
    atoms = list(encode(document, tokenizer, plan))
    if budget.holds(sum(len(atom.tokens) for atom in atoms), [atom.patches for atom in atoms if atom.image]):
        return [join(atoms)]
    if long == "drop":
        return []
    pieces = truncate(atoms, budget) if long == "truncate" else split(atoms, budget, plan.merge_size)
    return [join(piece) for piece in pieces]


def encode(document: Document, tokenizer: Tokenizer, plan: Grid) -> Iterator[Atom]:
    """The parts as tokens; bos and eos are atoms of their own."""
    yield Atom([tokenizer.bos_id], [False])
    numbers = itertools.count()
    for _, group in itertools.groupby(document.parts, key=type):
        texts: list[Text] = []
        for part in group:
            if isinstance(part, Text):
                texts.append(part)
            elif isinstance(part, Image):
                yield encode_image(part, tokenizer, plan, next(numbers))
            else:
                yield encode_special(part, tokenizer)
        if texts:
            yield encode_text(texts, tokenizer)
    last = document.parts[-1]
    if not (isinstance(last, Special) and tokenizer.special_id(last.spelling) == tokenizer.eos_id):  # a chat template may end with it
        yield Atom([tokenizer.eos_id], [True])


def encode_text(texts: list[Text], tokenizer: Tokenizer) -> Atom:
    if len({text.loss for text in texts}) > 1:
        return Atom(*encode_texts(texts, tokenizer))
    ids = tokenizer.encode("".join(text.text for text in texts))  # no offsets needed: twice as fast
    return Atom(ids, [texts[0].loss] * len(ids))


def encode_image(image: Image, tokenizer: Tokenizer, plan: Grid, number: int) -> Atom:
    h, w = plan.grid(image.height, image.width)
    visual = h * w // plan.merge_size**2
    ids = [tokenizer.begin_image_id, *[tokenizer.image_id] * visual, tokenizer.end_image_id]
    return Atom(ids, [False] * len(ids), image, h, w, number)


def encode_special(part: Special, tokenizer: Tokenizer) -> Atom:
    """A tokenizer that does not know a chat marker spells it out."""
    known = tokenizer.special_id(part.spelling)
    ids = tokenizer.encode(part.spelling) if known is None else [known]
    return Atom(ids, [part.loss] * len(ids))


def join(atoms: list[Atom]) -> Sample:
    starts = itertools.accumulate((len(atom.tokens) for atom in atoms), initial=0)
    return Sample(
        tokens=np.fromiter(itertools.chain.from_iterable(atom.tokens for atom in atoms), np.int32),
        targets=np.fromiter(itertools.chain.from_iterable(atom.targets for atom in atoms), bool),
        images=[
            PlannedImage(start, atom.number, atom.h, atom.w, atom.image) for start, atom in zip(starts, atoms, strict=False) if atom.image
        ],
    )


class _Piece:
    """Atoms that are being gathered into one piece."""

    def __init__(self, budget: Budget):
        self.budget = budget
        self.atoms: list[Atom] = []
        self.tokens = 0
        self.patches = 0

    def room_for(self, atom: Atom) -> bool:
        images = [kept.patches for kept in (*self.atoms, atom) if kept.image]
        return self.budget.holds(self.tokens + len(atom.tokens), images)

    def add(self, atom: Atom) -> None:
        self.atoms.append(atom)
        self.tokens += len(atom.tokens)
        self.patches += atom.patches


def split(atoms: list[Atom], budget: Budget, merge: int) -> list[list[Atom]]:
    """Pieces near the goal: an atom joins if at least half of it lies on this side of it."""
    goal_tokens, goal_patches = piece_goal(atoms, budget, merge)
    pieces = [_Piece(budget)]
    rest = atoms[::-1]
    while rest:
        atom, piece = rest.pop(), pieces[-1]
        near = piece.tokens + len(atom.tokens) / 2 <= goal_tokens and (not atom.image or piece.patches + atom.patches / 2 <= goal_patches)
        closing = len(atom.tokens) == 1  # bos, eos or a chat marker: no piece of its own
        if piece.room_for(atom) and (near or closing or not piece.atoms):
            piece.add(atom)
        elif not atom.image and len(atom.tokens) > budget.seq_len:
            rest += reversed(atom.chunks(goal_tokens - piece.tokens, goal_tokens))
        else:
            assert piece.atoms, "an image larger than a slot: the configuration check lets none through"
            pieces.append(_Piece(budget))
            rest.append(atom)
    return [piece.atoms for piece in pieces]


def piece_goal(atoms: list[Atom], budget: Budget, merge: int) -> tuple[int, float]:
    """Tokens and patches that a piece should have, so that what shares its slot can fill both sides.

    With images, about equal pieces of at most two thirds of a slot. Text alone: so much of a slot that images in the rest of
    it, at most merge^2 patches a token, can bring all of the slot's patches; a whole slot where slots are not for images.
    """
    tokens, patches = sum(len(atom.tokens) for atom in atoms), sum(atom.patches for atom in atoms)
    if patches:
        count = math.ceil(max(tokens / budget.seq_len, patches / budget.patches) / GOAL)
        return math.ceil(tokens / count), patches / count
    ratio = budget.patches / budget.seq_len
    if ratio < TEXT_RATIO:
        return budget.seq_len, 0
    room = max(1 - ratio / (DENSE * merge**2), 1 / MOST_PARTS)
    return budget.seq_len // math.ceil(1 / room), 0


def truncate(atoms: list[Atom], budget: Budget) -> list[list[Atom]]:
    """The longest beginning that fits: a text is cut, an image is left out and ends it."""
    piece = _Piece(budget)
    for atom in atoms:
        if not piece.room_for(atom):
            if not atom.image and piece.tokens < budget.seq_len:
                piece.add(atom.chunks(budget.seq_len - piece.tokens, budget.seq_len)[0])
            break
        piece.add(atom)
    return [piece.atoms]
