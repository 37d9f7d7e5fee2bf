"""Where a document longer than a slot may be cut: on integers alone, and only when the slot is planned.

An `Outline` is what the planner knows of a document: how many tokens, where its images lie among them, where
parts begin. A piece is a range [start, end) of its tokens. Text may be cut at any token, an image nowhere:

    tokens   0 ........ 40 [image 72 tokens] 112 .............. 300
    cuts     anywhere up to 40             from 112 on; better at 40, 112 or another boundary if one is near

Joined in their order, the pieces are the document: nothing is lost or repeated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from experiments.vlm.data.packing import Budget, place

# tokens of a piece, and of what a piece leaves behind; a slot of fewer than 256: an eighth of it
SHORTEST = 32
NEAR = 128  # a cut moves back to where a part begins if that costs at most S / NEAR tokens (0.8 % of a slot)
# of a slot, at most, for the piece of a document with images that goes in first: others fill the rest
GOAL = 2 / 3
TEXT_RATIO = 0.5  # slots with fewer patches a token are for text
DENSE = 0.8  # of a sample that is nearly all image, the share of its tokens that are visual
MOST_PARTS = 4  # of a slot made for images, that the text which goes in first takes one of


@dataclass(frozen=True)
class Outline:
    """Images ascend: i has tokens [starts[i], ends[i]), views of views[i] patches. `boundaries`: of parts."""

    length: int
    starts: np.ndarray  # int64 [images]
    ends: np.ndarray
    views: Sequence[Sequence[int]]
    boundaries: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @cached_property
    def patches(self) -> np.ndarray:
        """int64 [images]: of all views."""
        return np.array([sum(views) for views in self.views], np.int64)

    @cached_property
    def patches_before(self) -> np.ndarray:
        """[images + 1]: patches of the images before each."""
        return np.concatenate([[0], np.cumsum(self.patches)])

    def image_at(self, token: int) -> int:
        """The first image that does not begin before `token`."""
        return int(np.searchsorted(self.starts, token))

    def images(self, start: int, end: int) -> list[int]:
        """Patches of each view of each image in the piece."""
        return self.of_views(self.image_at(start), self.image_at(end))

    def of_views(self, first: int, last: int) -> list[int]:
        """Patches of each view of images [first, last)."""
        return [patches for views in self.views[first:last] for patches in views]

    def patches_of(self, start: int, end: int) -> int:
        """Patches of all images in the piece."""
        return int(self.patches_before[self.image_at(end)] - self.patches_before[self.image_at(start)])


def outline_of(parts: Any) -> Outline:
    """The outline of parts given as (tokens, patches) in their order; patches 0: text."""
    sizes = np.array(parts, np.int64).reshape(-1, 2)
    ends = np.cumsum(sizes[:, 0])
    starts, is_image = ends - sizes[:, 0], sizes[:, 1] > 0
    return Outline(
        int(sizes[:, 0].sum()), starts[is_image], ends[is_image], sizes[is_image, 1:].tolist(), starts
    )


@dataclass(frozen=True)
class Splitter:
    """The rules of cutting, for slots of one budget."""

    budget: Budget
    merge_size: int

    @property
    def shortest(self) -> int:
        """Tokens of the shortest piece."""
        return min(SHORTEST, self.budget.seq_len // 8)

    def holds(self, outline: Outline, start: int = 0) -> bool:
        """Whether an empty slot has room for all that is left from `start` on."""
        return self.budget.holds(outline.length - start, outline.images(start, outline.length))

    def fits(self, outline: Outline, start: int = 0) -> bool:
        """Whether it also leaves room for what fills the other side: no text of more than half a slot that is
        made for images.
        """
        tokens, patches = outline.length - start, outline.patches_of(start, outline.length)
        budget = self.budget
        balanced = budget.patches - patches <= DENSE * self.merge_size**2 * (budget.seq_len - tokens)
        for_text = budget.patches < TEXT_RATIO * budget.seq_len
        return (balanced or for_text or tokens * MOST_PARTS <= budget.seq_len) and self.holds(outline, start)

    def longest(self, outline: Outline) -> int:
        """The end of the longest beginning that fits: text is cut to the token, images are whole."""
        return self._end_of_room(outline, 0, self.budget.seq_len, self.budget.patches)

    def reach(
        self,
        outline: Outline,
        start: int,
        tokens: int,
        patches: int,
        in_slot: tuple[int, ...] = (),
        begun: int | None = None,
    ) -> int:
        """How far a piece from `start` gets with so many tokens and patches left in the slot: its end,
        `start` for none.

        `in_slot`: patches of each view that the slot holds already (for slots of several rows). `begun`:
        where the piece really begins, if it is one that is made longer.
        """
        end = self._end_of_room(outline, start, tokens, patches, in_slot)
        if end == outline.length:
            return end
        if outline.length - end < self.shortest:
            shorter = self._outside_images(outline, outline.length - self.shortest)
            end = shorter if shorter > start else end
        end = max(start, self._at_boundary(outline, end))
        crumb = end - (start if begun is None else begun) < self.shortest and not outline.images(start, end)
        return start if crumb else end

    def first(self, outline: Outline, start: int) -> int:
        """The end of a piece that leaves room for what can share its slot and fill both sides.

        With images, about equal pieces of at most two thirds of a slot. Text alone: so much of a slot that
        images in the rest of it, at most merge^2 patches a token, can bring all of its patches; a whole slot
        where slots are for text.
        """
        budget, rest, patches = self.budget, outline.length - start, outline.patches_of(start, outline.length)
        if patches:
            count = math.ceil(max(rest / budget.seq_len, patches / budget.patches) / GOAL)
            goal_tokens, goal_patches = -(-rest // count), -(-patches // count)
        else:
            ratio = budget.patches / budget.seq_len
            room = max(1 - ratio / (DENSE * self.merge_size**2), 1 / MOST_PARTS) if ratio >= TEXT_RATIO else 1
            goal_tokens, goal_patches = budget.seq_len // math.ceil(1 / room), 0
        end = self.reach(outline, start, goal_tokens, goal_patches)
        # An empty slot has room for whatever comes next.
        return end if end > start else self._end_of_room(outline, start, budget.seq_len, budget.patches)

    def _end_of_room(
        self, outline: Outline, start: int, tokens: int, patches: int, in_slot: tuple[int, ...] = ()
    ) -> int:
        first = outline.image_at(start)
        most = outline.patches_before[first] + patches
        allowed = int(np.searchsorted(outline.patches_before, most, "right")) - 1
        if self.budget.patch_rows > 1:
            while (
                allowed > first and place([*in_slot, *outline.of_views(first, allowed)], self.budget) is None
            ):
                allowed -= 1
        stop = int(outline.starts[allowed]) if allowed < len(outline.starts) else outline.length
        return self._outside_images(outline, min(start + tokens, stop))

    def _outside_images(self, outline: Outline, token: int) -> int:
        """`token`, or the beginning of the image that it lies in."""
        before = int(np.searchsorted(outline.starts, token)) - 1
        return int(outline.starts[before]) if before >= 0 and token < outline.ends[before] else token

    def _at_boundary(self, outline: Outline, end: int) -> int:
        """The last boundary that is near, or `end`."""
        before = int(np.searchsorted(outline.boundaries, end, "right")) - 1
        if before < 0 or end - int(outline.boundaries[before]) > self.budget.seq_len // NEAR:
            return end
        return int(outline.boundaries[before])
