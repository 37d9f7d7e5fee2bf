"""Draw a sheet of pictures from the embedded world with their captions.

python scripts/draw_world.py --out docs/images/world.png
python scripts/draw_world.py --out varied.png --world captions --seed 3
python scripts/draw_world.py --out docs/images/reads.png --world reads
"""

import argparse
import random
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.vlm.world.caption import describe, varied_caption  # noqa: E402
from experiments.vlm.world.render import render  # noqa: E402
from experiments.vlm.world.scene import sees_scene, varied_scene  # noqa: E402
from experiments.vlm.world.strips import draw_strip, random_strip  # noqa: E402

WIDTH, HEIGHT = 1200, 720
CELL_WIDTH, GAP, LINE = 236, 4, 15  # pixels


def _sees(rng: random.Random) -> tuple[Image.Image, str]:
    scene = sees_scene(rng, False)
    return render(scene), describe(scene)


def _captions(rng: random.Random) -> tuple[Image.Image, str]:
    scene = varied_scene(rng, False, longest=220)
    return render(scene), varied_caption(scene, rng)


def _reads(rng: random.Random) -> tuple[Image.Image, str]:
    while True:
        strip = random_strip(rng, True)
        image = draw_strip(strip, rng, written_anew=False)
        if image.width < CELL_WIDTH:
            return image, strip.text


DRAW: dict[str, Callable[[random.Random], tuple[Image.Image, str]]] = {
    "sees": _sees,
    "captions": _captions,
    "reads": _reads,
}


def sheet(world: str, seed: int) -> Image.Image:
    """Pictures at their true size, each above its caption, in columns that are filled from the top."""
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(12)
    rng = random.Random(seed)
    bottoms = [GAP] * (WIDTH // CELL_WIDTH)
    misses = 0
    while misses < 20:
        picture, caption = DRAW[world](rng)
        lines = wrap(caption, draw, font)
        y = min(bottoms)
        height = picture.height + LINE * len(lines) + 3 * GAP
        if y + height > HEIGHT:
            misses += 1
            continue
        column = bottoms.index(y)
        x = GAP + column * CELL_WIDTH
        page.paste(picture, (x, y))
        for i, line in enumerate(lines):
            draw.text((x, y + picture.height + GAP + i * LINE), line, fill="black", font=font)
        bottoms[column] += height
    return page


def wrap(
    text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= CELL_WIDTH - 3 * GAP:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--world", choices=DRAW, default="sees")
    parser.add_argument("--seed", type=int, default=203)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(arguments.world, arguments.seed).save(arguments.out, optimize=True)
    print(
        f"{arguments.out}: {arguments.out.stat().st_size / 1024:.0f} KiB; the same pictures in shards: "
        f"embedded:{arguments.world}"
    )


if __name__ == "__main__":
    main()
