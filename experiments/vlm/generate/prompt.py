"""A prompt, made as a training sample is made: parts, then tokens, then patches, without the end.

In: turns of a conversation, or texts and images to go on from; images as bytes. Out: a Prompt, whose images
are decoded, so that what cannot be read is refused before anything is computed.

Letters: t tokens, N patch rows, L patches a row, D values a patch.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.vlm.batch import FIELDS, PLACING, BatchShape
from experiments.vlm.data.chat_template import ChatTemplate
from experiments.vlm.data.collate import Collator
from experiments.vlm.data.document import Document, Image, ImageValue, Picture, Special, Text, Turn
from experiments.vlm.data.image import probe
from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.data.packing import Budget, place
from experiments.vlm.data.rejects import Rejected, meaning
from experiments.vlm.data.sample import Sample, make_sample
from experiments.vlm.data.slot import Origin, Packed, SlotPlan
from experiments.vlm.data.sources.reader import Reference
from torchtitan.components.tokenizer import Tokenizer
from torchtitan.config.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """Tokens and the patches that they point at."""

    ids: list[int]
    # `ids`, with a number for an image's content in its places: equal where the model reads the same
    identity: list[int]
    targets: np.ndarray  # bool [t]: what training would have predicted
    # Fields of the batch contract: where visual tokens go, [t] and more; and the patch rows they come from
    placing: dict[str, np.ndarray]
    pixel_values: np.ndarray  # uint8 [N, L, D]
    grid_thw: np.ndarray  # int32 [N, L, 3]

    @property
    def visual_index(self) -> np.ndarray:
        """int64 [t]."""
        return self.placing["visual_index"]

    @property
    def rich(self) -> bool:
        """Whether it points at images."""
        return bool((self.visual_index >= 0).any())

    def rest(self, start: int, end: int | None = None) -> "Prompt":
        """The tokens from `start` on, up to `end` where it is given."""
        tail = slice(start, end)
        return replace(
            self,
            ids=self.ids[tail],
            identity=self.identity[tail],
            targets=self.targets[tail],
            placing={name: values[tail] for name, values in self.placing.items()},
        )

    def tensors(self, width: int) -> dict[str, Tensor]:
        """The fields of a batch of one slot of so many tokens that images need."""
        rows = {"pixel_values": self.pixel_values, "grid_thw": self.grid_thw}
        for name, values in self.placing.items():
            rows[name] = np.full((1, width, *values.shape[1:]), FIELDS[name].padding, FIELDS[name].dtype)
            rows[name][0, : len(values)] = values
        return {name: torch.from_numpy(values) for name, values in rows.items()}


Turns = Sequence[tuple[str, Sequence[str | Picture]]]  # (role, texts and images in order) of each message


EMPTY_ANSWER = "an answer is empty, so it has no likelihood"
ONE_TURN = "this model was trained without conversations and answers one turn at a time"


class _HeldPictures:
    """Images in memory, where a collator looks for an opened shard; their locators are their numbers."""

    def __init__(self, pictures: Sequence[Picture]):
        self.pictures = pictures

    def load(self, image: Image) -> bytes:
        return self.pictures[image.locator].data

    def use(self, source: int, path: str, work: Callable[[Any], Any]) -> Any:
        return work(self)


class Prompter:
    """Makes prompts of one model. Raises UserError that names the image, or says what is too long."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        plan: ImagePlan,
        budget: Budget,
        most_tokens: int,
        template: ChatTemplate | None = None,
        sharers: int = 1,
    ):
        """`budget`: the most of a prompt, which gets only the patch rows that its images need, and as many as
        divide among `sharers` ranks; `template`: None where the model was trained without conversations.
        """
        self.tokenizer = tokenizer
        self.plan = plan
        self.budget = budget
        self.most_tokens = most_tokens
        self.template = template
        self.sharers = sharers

    def conversation(self, turns: Turns) -> Prompt:
        """The prompt of a conversation in which the assistant is to speak next."""
        said, pictures = _numbered(turns)
        lead = self.template.lead if self.template else ""
        said = [_without_lead(turn, lead) if turn.role == "assistant" else turn for turn in said]
        return self._prompt(self._render(said, prompt=True), pictures, conversation=True)

    def answered(self, turns: Turns, answer: str) -> Prompt:
        """The prompt with an answer behind it, to the answer's last token."""
        if not answer:
            raise UserError(EMPTY_ANSWER)
        if self.template is None:
            return self.beginning([*self._one_turn(turns), answer])
        said, pictures = _numbered([*turns, ("assistant", [answer])])
        parts = self._render(said, prompt=False)
        spoken = [i for i, part in enumerate(parts) if isinstance(part, Text) and part.loss]
        if not spoken:  # the template cuts spaces off
            raise UserError(EMPTY_ANSWER)
        last = spoken[-1]
        return self._prompt(parts[: last + 1], pictures, conversation=True)

    def prompt(self, turns: Turns) -> Prompt:
        """What a user asks; without a chat template a document that begins as the one turn does."""
        return self.conversation(turns) if self.template else self.beginning(self._one_turn(turns))

    def beginning(self, parts: Sequence[str | Picture]) -> Prompt:
        """A document that is to go on: texts and images in order, as training data without turns begin."""
        whole = self.document(parts)
        if len(whole.ids) == 1:
            raise UserError("the prompt is empty")
        return whole.rest(0, -1)  # without its eos

    def document(self, parts: Sequence[str | Picture]) -> Prompt:
        """The same with its eos: nothing is to follow."""
        (turn,), pictures = _numbered([("", parts)])
        said = [Text(part) if isinstance(part, str) else part for part in turn.content]
        return self._prompt(said, pictures, conversation=False)

    def _one_turn(self, turns: Turns) -> Sequence[str | Picture]:
        if len(turns) > 1:
            raise UserError(f"{ONE_TURN}: send the last one alone, or start with --chat_template")
        return turns[0][1]

    def _render(self, said: Sequence[Turn], prompt: bool) -> list[Text | Special | ImageValue]:
        if self.template is None:
            raise UserError("this model has no chat template: give one with --chat_template")
        try:
            return self.template.render(said, prompt)
        except Rejected as rejected:
            raise UserError(f"the chat template refuses the conversation: {rejected.detail}") from None

    def _prompt(
        self, parts: Sequence[Text | Special | ImageValue], pictures: Sequence[Picture], conversation: bool
    ) -> Prompt:
        sized = [self._image(part, pictures) if isinstance(part, ImageValue) else part for part in parts]
        document = Document("prompt", sized, conversation=conversation)
        sample = make_sample(document, self.tokenizer, self.plan)
        if sample.length > self.most_tokens:
            raise UserError(
                f"the prompt has {sample.length} tokens with its {len(pictures)} images, more than the "
                f"{self.most_tokens} that a sequence may have: shorten it, or use fewer or smaller images"
            )
        views = self._collate(sample, pictures)
        return Prompt(
            sample.tokens.tolist(),
            _identity(sample, pictures),
            sample.targets,
            {name: views[name] for name in PLACING if name in views},
            views["pixel_values"],
            views["grid_thw"],
        )

    def _image(self, value: ImageValue, pictures: Sequence[Picture]) -> Image:
        picture = pictures[value.value]
        try:
            return Image(value.value, *probe(picture.data))
        except Rejected as rejected:
            raise UserError(_unreadable(picture, rejected.reason, rejected.detail)) from None

    def _collate(self, sample: Sample, pictures: Sequence[Picture]) -> dict[str, np.ndarray]:
        """The fields of a slot that holds this sample alone."""
        cells = sample.outline.images(0, sample.length)
        places = place(cells, self.budget)
        if places is None:
            raise UserError(
                f"{len(pictures)} images of {sum(cells)} patches do not "
                f"fit {self.budget.patch_rows} x {self.budget.patches_per_row} (data.patch_rows, "
                "data.patches_per_row): use fewer or smaller ones"
            )
        # Rows behind those that are used would be encoded for nothing.
        rows = 1 + max((row for row, _ in places), default=0)
        rows += -rows % self.sharers
        per_row, plan = self.budget.patches_per_row, self.plan
        shape = BatchShape(1, sample.length, rows, per_row, plan.patch_size, plan.mixes)
        fields = {name: np.empty(shape.of(name), field.dtype) for name, field in shape.fields.items()}
        views = {name: array[0] if FIELDS[name].dims[0] == "B" else array for name, array in fields.items()}
        packed = Packed(Reference(0, 0, 0), Origin("prompt", "", "", caption=False), sample, places)
        collator = Collator(_HeldPictures(pictures), self.plan, self.tokenizer.pad_id)
        filled = collator.start(SlotPlan(0, [packed]), views)()
        for reject in filled.rejects:
            raise UserError(_unreadable(pictures[reject.image or 0], reject.reason, reject.detail))
        return views


def read_picture(path: str, option: str) -> Picture:
    """The picture of a file that `option` names. Raises UserError."""
    file = Path(os.path.expanduser(path))
    try:
        if file.exists() and not file.is_file():  # a pipe may never end
            raise UserError(f"{option} {path}: is no file")
        return Picture(file.read_bytes(), path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{option} {path}: {getattr(error, 'strerror', None) or error}") from None


def _numbered(turns: Turns) -> tuple[list[Turn], list[Picture]]:
    """Turns whose images are numbers, and the images."""
    pictures = [part for _, content in turns for part in content if isinstance(part, Picture)]
    numbers = iter(range(len(pictures)))
    said = [
        Turn(role, [part if isinstance(part, str) else ImageValue(next(numbers)) for part in content])
        for role, content in turns
    ]
    return said, pictures


def _without_lead(turn: Turn, lead: str) -> Turn:
    """An answer as training data have it, where the model wrote what the template writes before it too."""
    first, *others = turn.content or [""]
    return replace(turn, content=[first.removeprefix(lead), *others]) if isinstance(first, str) else turn


def _identity(sample: Sample, pictures: Sequence[Picture]) -> list[int]:
    identity = sample.tokens.tolist()
    for image in sample.images:
        span = slice(image.start, image.end)
        # An image beside others may be cut otherwise than one alone, and then reads otherwise.
        layout, data = image.layout, pictures[image.image.locator].data
        read = repr(layout.views).encode() + layout.tokens.tobytes() + data
        number = int.from_bytes(hashlib.blake2b(read, digest_size=8).digest())
        identity[span] = [-1 - number] * len(identity[span])
    return identity


def _unreadable(picture: Picture, reason: str, detail: str) -> str:
    return f"{picture.name}: {meaning(reason)}" + (f" ({detail})" if detail else "")
