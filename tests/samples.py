"""Made for tests: images of every kind, tars, and photographs."""

import functools
import io
import json
import math
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, channels], smooth enough for JPEG."""
    small = np.random.default_rng(seed).integers(
        0, 256, (max(2, height // 8), max(2, width // 8), channels), dtype=np.uint8
    )
    planes = [
        np.asarray(Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BICUBIC))
        for c in range(channels)
    ]
    return np.stack(planes, axis=-1)


def encoded(image: Image.Image | np.ndarray, format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


def jpeg(height: int = 40, width: int = 60, seed: int = 0) -> bytes:
    return encoded(noise(height, width, seed=seed))


def llava(*turns: tuple, **fields) -> dict:
    """A record of LLaVA; `turns`: (speaker, text)."""
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **fields}


def messages(*turns: tuple, **fields) -> dict:
    """A record of messages; `turns`: (role, content)."""
    return {"messages": [{"role": who, "content": content} for who, content in turns], **fields}


def write_jsonl(path: Path, records: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_tar(
    path: Path | str, members: Iterable[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return Path(path)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Decibels; infinite where they are equal."""
    error = np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@functools.cache
def photographs() -> dict[str, Image.Image]:
    """Real ones, RGB, by the names of their files (tests/photographs/README.md)."""
    files = sorted(Path(__file__).with_name("photographs").glob("*.jpg"))
    return {file.stem: Image.open(file).convert("RGB") for file in files}


def mosaic(photo: Image.Image, height: int, width: int) -> Image.Image:
    """A photograph again and again: as sharp as a large one, and with as many high frequencies."""
    tiled = Image.new("RGB", (width, height))
    for top in range(0, height, photo.height):
        for left in range(0, width, photo.width):
            tiled.paste(photo, (left, top))
    return tiled
