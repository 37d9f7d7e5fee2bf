"""The short way to a JPEG's size: whenever it gives one, Pillow opens the image, and gives the same."""

import numpy as np
import pytest
from PIL import Image, ImageCms

from experiments.vlm.data import image as image_module
from experiments.vlm.data.jpeg_header import plain_jpeg_size
from tests.samples import encoded, noise

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PLAIN = {
    "baseline": encoded(noise(33, 50)),
    "progressive": encoded(noise(33, 50), progressive=True),
    "grey": encoded(noise(33, 50)[:, :, 0]),
    "with much before the frame": encoded(
        noise(33, 50), subsampling=0, restart_marker_blocks=2, comment="x", icc_profile=ICC
    ),
}


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


UNUSUAL = {
    "turned": encoded(noise(33, 50), exif=exif(6)),
    "four colours": encoded(Image.fromarray(noise(33, 50)).convert("CMYK")),
    "PNG": encoded(noise(33, 50), "PNG"),
    "cut off in the header": PLAIN["baseline"][:200],
    "empty": b"",
    "XMP": encoded(noise(33, 50), xmp=b"<x:xmpmeta tiff:Orientation='6'/>"),
}


def in_pillow(data: bytes) -> tuple[int, int]:
    image = image_module._open(data)
    assert (
        image.format == "JPEG" and image.mode in ("L", "RGB") and image_module._orientation(image, data) == 1
    )
    return image.height, image.width


@pytest.mark.parametrize("name", PLAIN)
def test_plain_jpegs_need_no_pillow(name):
    assert plain_jpeg_size(PLAIN[name]) == (33, 50) == in_pillow(PLAIN[name])


@pytest.mark.parametrize("name", UNUSUAL)
def test_of_anything_unusual_it_says_nothing(name):
    assert plain_jpeg_size(UNUSUAL[name]) is None


@pytest.mark.parametrize("name", [*PLAIN, "turned", "four colours", "XMP"])
def test_what_is_said_of_a_broken_header_is_what_pillow_says(name):
    data = np.frombuffer((PLAIN | UNUSUAL)[name], np.uint8)
    random, said = np.random.default_rng(0), 0
    header = min(len(data), 700)
    for _ in range(1500):
        broken = data.copy()
        for place in random.integers(0, header, random.integers(1, 4)):
            broken[place] = random.choice([0, 1, 0xDA, 0xE1, 0xFF, random.integers(256)])
        broken = broken[: random.integers(4, len(data) * 2)]
        size = plain_jpeg_size(broken.tobytes())
        if size is not None:
            said += 1
            assert size == in_pillow(broken.tobytes())
    assert said > 50 or name not in PLAIN


def test_an_image_that_pillow_would_warn_of_is_left_to_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 33 * 50 - 1)
    assert plain_jpeg_size(PLAIN["baseline"]) is None


def test_a_plain_jpeg_that_breaks_off_is_what_pillow_says_it_is():
    with pytest.raises(image_module.Rejected, match="ends before its last row"):
        image_module.decode(PLAIN["baseline"][:-300], 32, 32)
