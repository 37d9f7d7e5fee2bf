"""A record and what the model said to it as one picture: its images side by side, the words below."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from experiments.vlm.data.document import Picture
from experiments.vlm.data.image import decode, probe, shrunk
from experiments.vlm.evaluate.tasks import Line, Question
from torchtitan.components.sinks import Exhibit

LONGER_SIDE = 320  # pixels of an image
LETTER, LINE = 8, 18  # pixels
MOST_LETTERS = 600  # of one text in the picture; a caption has all of it


def thumbnail(picture: Picture) -> Image.Image:
    """At most LONGER_SIDE pixels a side."""
    return Image.fromarray(decode(picture.data, *shrunk(*probe(picture.data), LONGER_SIDE)))


def said(question: Question, line: Line) -> str:
    """The answer of a line, or the choice that it finds likeliest."""
    if "prediction" in line:
        return line["prediction"]
    logprobs = line["logprobs"]
    return question.choices[logprobs.index(max(logprobs))] if logprobs else ""


def exhibit(name: str, question: Question, line: Line) -> Exhibit:
    """`line`: see asking.py; of a task that writes or chooses."""
    asked = " ".join(part for part in question.content if isinstance(part, str)).strip()
    words = [
        f"{label}: {text}"
        for label, text in (
            ("question", asked), ("said", said(question, line)), ("right", " | ".join(question.answers))
        )
        if text or label == "said"
    ]  # fmt: skip
    pictures = [thumbnail(part) for part in question.content if isinstance(part, Picture)]
    return Exhibit(name, _drawn(pictures, words), "\n".join(words))


def _drawn(pictures: list[Image.Image], words: list[str]) -> np.ndarray:
    """uint8 [H, W, 3]. The font that Pillow brings has Latin letters alone."""
    width = max(LONGER_SIDE, sum(picture.width for picture in pictures))
    height = max((picture.height for picture in pictures), default=0)
    lines = [line for text in words for line in textwrap.wrap(text[:MOST_LETTERS], width // LETTER) or [text]]
    sheet = Image.new("RGB", (width, height + LINE * len(lines) + LINE // 2), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for number, line in enumerate(lines):
        draw.text((4, height + 4 + LINE * number), line, "black", font)
    return np.asarray(sheet)
