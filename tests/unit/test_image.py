"""Image bytes to patches: sizes by the rule, pixels as Pillow would have them, patches in the contract's
order.
"""

import io
import sys
import threading
import time

import einops
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments.vlm.data import image as image_module
from experiments.vlm.data.image import ImagePlan, decode, jpeg_factor, probe, probe_lazily, write_patches
from tests.reference.images import patchify, size_rule
from tests.samples import encoded, jpeg, mosaic, noise, photographs, psnr

SIDES = st.integers(1, 30_000)
PLANS = st.builds(
    lambda patch, merge, least, most: ImagePlan(patch, merge, min(least, most) * merge**2, most * merge**2),
    st.sampled_from([14, 16]),
    st.sampled_from([1, 2, 3]),
    st.integers(1, 400),
    st.integers(1, 400),
)


def in_pillow(data: bytes, height: int, width: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


@settings(max_examples=200, deadline=None)
@given(PLANS, SIDES, SIDES)
def test_every_image_gets_between_one_cell_and_the_maximum(plan, height, width):
    h, w = plan.grid(height, width)
    assert h % plan.merge_size == w % plan.merge_size == 0
    assert plan.merge_size**2 <= h * w <= plan.max_patches


@settings(max_examples=200, deadline=None)
@given(PLANS, SIDES, SIDES)
def test_the_grid_is_the_exported_processors_within_its_maximum(plan, height, width):
    most, least = (patches * plan.patch_size**2 for patches in (plan.max_patches, plan.min_patches))
    h, w = size_rule(height, width, plan.patch_size * plan.merge_size, least, most)
    if h * w <= most:
        assert plan.grid(height, width) == (h // plan.patch_size, w // plan.patch_size)


@pytest.mark.slow  # the import
def test_the_grid_equals_that_of_transformers():
    pytest.importorskip("torchvision")
    processor_module = pytest.importorskip("transformers.models.lfm2_vl.image_processing_lfm2_vl")
    rule = processor_module.Lfm2VlImageProcessor.smart_resize
    for height, width in [(480, 640), (500, 15), (100, 30), (3000, 4000), (33, 1000), (16, 16), (1, 1)]:
        w, h = rule(None, height, width, 2, 4, 256, 16)
        assert ImagePlan(16, 2, 16, 1024).grid(height, width) == (h // 16, w // 16)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((500, 15), (32, 2)), ((1, 20_000), (2, 512)), ((20_000, 1), (512, 2)), ((1, 1), (2, 2))],
)
def test_thin_images_survive(size, grid):
    assert ImagePlan().grid(*size) == grid


def test_square_takes_the_largest_square_whatever_the_image():
    plan = ImagePlan(max_patches=1020, resize="square")
    assert plan.grid(10, 5000) == plan.grid(700, 700) == (30, 30)


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_patches_are_in_the_order_of_the_contract(merge):
    plan = ImagePlan(patch_size=4, merge_size=merge)
    h, w = 2 * merge, 3 * merge
    pixels = np.random.default_rng(0).integers(0, 256, (h * 4, w * 4, 3), dtype=np.uint8)
    patches, thw = np.zeros((h * w, 48), np.uint8), np.full((h * w, 3), -7, np.int32)
    write_patches(pixels, plan, patches, thw)
    expected, places = patchify(pixels, 4, merge)
    assert np.array_equal(patches, expected)
    assert np.array_equal(thw, places)


def test_patches_equal_the_contract_written_in_einops():
    pixels = noise(64, 96)
    patches, thw = np.zeros((24, 768), np.uint8), np.zeros((24, 3), np.int32)
    write_patches(pixels[:, ::-1], ImagePlan(), patches, thw)  # a view, as flips give
    pattern = "(t pt) (h m1 ph) (w m2 pw) c -> (t h w m1 m2) (pt ph pw c)"
    assert np.array_equal(
        patches, einops.rearrange(pixels[None, :, ::-1], pattern, pt=1, ph=16, pw=16, m1=2, m2=2)
    )


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_photographs_equal_pillow_to_50_decibels(scale):
    """Pillow's own decoder and antialiased resize; what differs is rounding in torch's kernel."""
    for name, photo in photographs().items():
        data = encoded(
            photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BICUBIC),
            quality=90,
        )
        h, w = ImagePlan().grid(*probe(data))
        assert psnr(decode(data, h * 16, w * 16), in_pillow(data, h * 16, w * 16)) > 50, name


@pytest.mark.parametrize("target", [(96, 160), (64, 64), (32, 256)])
def test_small_jpegs_are_shrunk_only_where_50_decibels_remain(target):
    for name, photo in photographs().items():
        # odd sides: no whole blocks
        data = encoded(photo.crop((0, 0, photo.width - 1, photo.height - 1)), quality=90)
        assert psnr(decode(data, *target), in_pillow(data, *target)) > 50, name


def test_large_jpegs_are_shrunk_and_stay_above_40_decibels():
    photo = photographs()["astronaut"]
    tiled = mosaic(photo, photo.height * 7 - 3, photo.width * 7 - 3)
    data = encoded(tiled, quality=90)
    assert jpeg_factor((tiled.height, tiled.width), (416, 608)) == 2
    assert psnr(decode(data, 416, 608), in_pillow(data, 416, 608)) > 40


def test_the_decoder_never_shrinks_below_what_the_resize_needs():
    for side in range(100, 9000, 37):
        factor = jpeg_factor((side, side), (512, 512))
        assert factor == 1 or side / factor >= 2 * 512


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_turns_the_image(format, orientation):
    image = Image.fromarray(noise(48, 80))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if format != "TIFF" else {}
    data = encoded(image, format, exif=exif, **options)
    size = (80, 48) if orientation >= 5 else (48, 80)
    turned = np.asarray(turn(image, orientation))
    assert probe(data) == size
    assert psnr(decode(data, *size), turned) > 30  # lossy formats; a wrong turn is below 15


def turn(image: Image.Image, orientation: int) -> Image.Image:
    t = Image.Transpose
    turns = {
        2: t.FLIP_LEFT_RIGHT,
        3: t.ROTATE_180,
        4: t.FLIP_TOP_BOTTOM,
        5: t.TRANSPOSE,
        6: t.ROTATE_270,
        7: t.TRANSVERSE,
        8: t.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def test_a_header_longer_than_the_first_read_is_read_whole():
    data = jpeg(40, 60)
    padding = b"\xff\xe2\xff\xff" + b"x" * 65533  # an application segment of the largest size
    long = data[:2] + padding * 3 + data[2:]
    reads = []

    def read(count: int) -> bytes:
        reads.append(count)
        return long[:count]

    assert probe_lazily(read, len(long)) == (40, 60)
    assert reads == [image_module.HEAD_BYTES, len(long)]


def test_the_header_of_a_jpeg_is_read_without_its_pixels():
    data = encoded(np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8), quality=95)
    assert len(data) > 2 * image_module.HEAD_BYTES
    assert probe_lazily(lambda count: data[: min(count, image_module.HEAD_BYTES)], len(data)) == (600, 600)


def test_threads_decode_into_buffers_of_their_own():
    images = [jpeg(200 + 40 * number, 300, seed=number) for number in range(8)]
    alone = [decode(data, 96, 128) for data in images]
    together: list = [None] * 80

    def work(start: int) -> None:
        for number in range(start, 80, 4):
            together[number] = decode(images[number % 8], 96, 128)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(together[number], alone[number % 8]) for number in range(80))


def test_decoding_lets_other_threads_run():
    """A pure-Python thread works while images are decoded.

    With the interpreter lock held it would stand still.
    """
    data = encoded(noise(3000, 3000), quality=95)
    decode(data, 512, 512)
    stop, worked = threading.Event(), [0.0]

    def work() -> None:
        while not stop.is_set():
            worked[0] = time.thread_time()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    worker = threading.Thread(target=work)
    worker.start()
    start, before = time.thread_time(), worked[0]
    for _ in range(5):
        decode(data, 512, 512)
    share = (worked[0] - before) / (time.thread_time() - start)
    stop.set()
    worker.join()
    sys.setswitchinterval(interval)
    # of the decoding thread's time, near 1 here; held, a switch interval or two in each of five decodes: 3 %
    assert share > 0.2
