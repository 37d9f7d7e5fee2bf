"""Pillow is the judge: what it opens, loads and converts is delivered, everything else is rejected with its
reason.
"""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from experiments.vlm.data.image import decode, probe
from experiments.vlm.data.rejects import Rejected
from tests.samples import encoded, jpeg, noise, psnr

HEIGHT, WIDTH = 48, 80


def photo(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(noise(HEIGHT, WIDTH)).convert(mode)


def animation(format: str) -> bytes:
    frames = [Image.fromarray(noise(HEIGHT, WIDTH, seed=seed)) for seed in range(3)]
    options = {"lossless": True} if format == "WEBP" else {}
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)


GOOD = {
    "grey JPEG": encoded(photo("L")),
    "progressive JPEG": encoded(photo(), progressive=True),
    "JPEG, not subsampled": encoded(photo(), subsampling=0),
    "CMYK JPEG": encoded(photo("CMYK")),
    "CMYK TIFF": encoded(photo("CMYK"), "TIFF"),
    "1-bit PNG": encoded(photo("1"), "PNG"),
    "palette PNG": encoded(photo().quantize(50), "PNG"),
    "palette GIF": encoded(photo().quantize(50), "GIF"),
    "lossless WebP": encoded(photo(), "WEBP", lossless=True),
    "BMP": encoded(photo(), "BMP"),
    "TIFF": encoded(photo(), "TIFF"),
    "LZW TIFF": encoded(photo(), "TIFF", compression="tiff_lzw"),
    "YCbCr TIFF": encoded(photo("YCbCr"), "TIFF"),
    "HSV as PNG": encoded(photo("HSV").convert("RGB"), "PNG"),
    "PPM": encoded(photo(), "PPM"),
    "animated GIF": animation("GIF"),
    "animated WebP": animation("WEBP"),
    "animated PNG": animation("PNG"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_what_pillow_reads_is_delivered_as_pillow_reads_it(kind):
    data = GOOD[kind]
    assert probe(data) == (HEIGHT, WIDTH)
    try:
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except OSError:  # a YCbCr TIFF is cut short for a Pillow before 13
        with pytest.raises(Rejected):
            decode(data, HEIGHT, WIDTH)
        return
    assert psnr(decode(data, HEIGHT, WIDTH), expected) > 50


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_transparency_is_composited_onto_white(mode):
    image = photo("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))))
    if mode == "LA":
        image = image.convert("LA")
    if mode in ("P", "PA"):
        image = image.quantize(40, method=Image.Quantize.FASTOCTREE)
    data = encoded(image, "PNG")
    rgba = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(decode(data, HEIGHT, WIDTH) - expected).max() <= 1


def test_a_transparent_colour_of_a_png_is_white():
    image = Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3))
    image.paste((200, 0, 0), (0, 0, 40, HEIGHT))
    pixels = decode(encoded(image, "PNG", transparency=(1, 2, 3)), HEIGHT, WIDTH)
    assert pixels[0, 0].tolist() == [200, 0, 0]
    assert pixels[0, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_and_not_clipped(format):
    grey = np.tile(np.linspace(0, 65535, WIDTH).astype(np.uint16), (HEIGHT, 1))
    pixels = decode(encoded(grey, format), HEIGHT, WIDTH)
    assert np.abs(pixels[0, :, 0] - np.linspace(0, 255, WIDTH)).max() <= 1


def test_floats_of_0_to_1_are_scaled():
    ramp = np.tile(np.linspace(0, 1, WIDTH).astype(np.float32), (HEIGHT, 1))
    pixels = decode(encoded(ramp, "TIFF"), HEIGHT, WIDTH)
    assert np.abs(pixels[0, :, 0] - np.linspace(0, 255, WIDTH)).max() <= 1


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 1), (500, 15)])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_thin_and_tiny_images_are_good(format, size):
    data = encoded(noise(*size), format)
    assert probe(data) == size
    assert decode(data, 32, 64).shape == (32, 64, 3)


def test_broken_metadata_costs_no_image():
    exif = b"Exif\0\0" + b"MM\0*" + b"\xff" * 40
    data = jpeg(HEIGHT, WIDTH)
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    assert probe(data) == (HEIGHT, WIDTH)
    assert decode(data, HEIGHT, WIDTH).shape == (HEIGHT, WIDTH, 3)


def test_a_png_that_tells_its_orientation_late_is_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(), "PNG")
    late = data[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + data[-12:]  # after the pixels
    assert probe(late) == (WIDTH, HEIGHT)
    assert np.array_equal(decode(late, WIDTH, HEIGHT), np.rot90(decode(data, HEIGHT, WIDTH), -1))


def test_a_jpeg_that_the_fast_decoder_complains_of_is_pillows_to_judge():
    data = jpeg(HEIGHT, WIDTH)
    scan = data.index(b"\xff\xda")
    odd = data[:scan] + b"\x00\x00\x00" + data[scan:]  # bytes between markers: libjpeg warns, and goes on
    expected = np.asarray(Image.open(io.BytesIO(odd)).convert("RGB"))
    assert psnr(decode(odd, HEIGHT, WIDTH), expected) > 50


HEADER = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
BOMB = (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", HEADER)
    + chunk(b"IDAT", zlib.compress(bytes(9)))
    + chunk(b"IEND", b"")
)


def reason(data: bytes) -> str:
    """Why an image is rejected, at its header or at its pixels."""
    with pytest.raises(Rejected) as rejected:
        probe(data)
        decode(data, 32, 32)
    return rejected.value.reason


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("part", [0.3, 0.5, 0.9])
def test_a_truncated_image_is_rejected_wherever_it_ends(format, part):
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(
        np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8), format, **options
    )
    assert reason(data[: int(len(data) * part)]) == "image_truncated"


def test_a_jpeg_is_never_good_to_one_decoder_and_truncated_to_the_judge():
    data = jpeg(HEIGHT, WIDTH)
    for end in range(100, len(data), 7):
        try:
            Image.open(io.BytesIO(data[:end])).load()
        except Exception:
            assert reason(data[:end])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "image_empty"),
        (b"<html>404 not found</html>", "image_undecodable"),
        (b"\xff\xd8\xff", "image_undecodable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "image_undecodable"),
        (BOMB, "image_too_large"),
    ],
    ids=["zero bytes", "a web page", "only a marker", "a program (EPS)", "a decompression bomb"],
)
def test_what_is_no_image_is_rejected_for_its_own_reason(data, expected):
    assert reason(data) == expected


def test_the_same_broken_bytes_are_told_in_the_same_words():
    told = []
    for _ in range(2):
        with pytest.raises(Rejected) as rejected:
            probe(b"<html>" + bytes(100))
        told.append(rejected.value.detail)
    assert told == ["UnidentifiedImageError: cannot identify image file"] * 2


def test_a_bomb_in_a_jpeg_header_is_rejected():
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    assert reason(bytes(data)) == "image_too_large"
