"""What decoding takes: a large image is never there twice, and threads share room for large ones."""

import io
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from experiments.vlm.data import rgb
from experiments.vlm.data.decoding_memory import DecodingMemory
from experiments.vlm.data.image import decode
from tests.samples import encoded, noise

SIDE = 3000  # 9 megapixels
BASE_MIB = 40  # of a decoder and intermediate results, whatever the image

PEAK = """
import re, sys
from concurrent.futures import ThreadPoolExecutor
from experiments.vlm.data import image
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.decoding_memory import DecodingMemory

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def decode(path):
    try:
        image.decode(open(path, "rb").read(), 256, 256)
    except Rejected:
        pass

decode(sys.argv[3])
image.KEPT_PIXELS, image._memory = 0, DecodingMemory(int(sys.argv[2]))
open("/proc/self/clear_refs", "w").write("5")
before = peak()
with ThreadPoolExecutor(int(sys.argv[1])) as pool:
    list(pool.map(decode, sys.argv[4:]))
print(peak() - before)
"""


def with_size(data: bytes, height: int, width: int) -> bytes:
    """A JPEG whose header says another size."""
    place = 2
    while data[place + 1] not in (0xC0, 0xC2):
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return data[: place + 5] + size + data[place + 9 :]


NEEDS_PEAK = pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's peak of a process"
)


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    """A folder of small files of many pixels."""
    folder = tmp_path_factory.mktemp("bombs")
    photo, red = Image.fromarray(noise(40, 60)), Image.new("RGB", (SIDE, SIDE), "red")
    grey = Image.fromarray(np.full((SIDE, SIDE), 40000, np.uint16))
    files = {
        "small.png": encoded(photo.convert("RGBA"), "PNG"),
        "rgb.png": encoded(red, "PNG", compress_level=1),
        "grey.png": encoded(grey, "PNG", compress_level=1),
        "lie.jpg": with_size(encoded(photo), SIDE, SIDE),
        "cut.jpg": with_size(encoded(photo, progressive=True), SIDE, SIDE)[:-2],
        "white.webp": encoded(red, "WEBP", lossless=True, method=0, quality=0),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def peak_mib(folder, names: list[str], threads: int = 1, room: int = 1 << 30) -> float:
    """Peak memory of a process that decodes these files."""
    paths = [str(folder / name) for name in ("small.png", *names)]
    command = [sys.executable, "-c", PEAK, str(threads), str(room), *paths]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return float(done.stdout)


@NEEDS_PEAK
def test_a_large_image_is_there_once(bombs):
    """Before, these took 14 and 26 bytes a pixel."""
    assert peak_mib(bombs, ["rgb.png", "grey.png", "lie.jpg"]) < 8 * SIDE**2 / 2**20 + BASE_MIB


@NEEDS_PEAK
def test_threads_that_decode_bombs_stay_within_the_room_for_them(bombs):
    """Without it three of them took 3 * 17 bytes a pixel; of one that is rejected nothing stays."""
    room = 17 * SIDE**2
    names = ["white.webp", "cut.jpg"] * 3
    assert peak_mib(bombs, names, threads=3, room=room) < room / 2**20 + 2 * BASE_MIB


MODES = {
    "RGB": lambda image: encoded(image, "PNG"),
    "CMYK": lambda image: encoded(image.convert("CMYK"), "TIFF"),
    "transparent palette": lambda image: encoded(image.quantize(20), "PNG", transparency=3),
    "RGBA": lambda image: encoded(image.convert("RGBA"), "WEBP", lossless=True),
    "16 bits": lambda image: encoded(
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256), "PNG"
    ),
    "12 of 32 bits": lambda image: encoded(
        Image.fromarray(np.asarray(image.convert("L")).astype(np.int32) * 16), "TIFF"
    ),
    "float": lambda image: encoded(
        Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255), "TIFF"
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", [(32, 48), (32, 160), (160, 48), (160, 240), (90, 130)])
def test_strips_make_the_same_pixels_as_the_whole_image(monkeypatch, mode, target):
    data = MODES[mode](Image.fromarray(noise(90, 130)))
    monkeypatch.setattr(rgb, "STRIP_PIXELS", 1 << 30)
    whole = decode(data, *target)
    for strip in (1, 1000, 3500):
        monkeypatch.setattr(rgb, "STRIP_PIXELS", strip)
        assert np.array_equal(decode(data, *target), whole)


def test_strips_see_what_pillow_sees():
    image = Image.fromarray(noise(50, 70))
    data = encoded(image, "PNG")
    assert np.array_equal(decode(data, 50, 70), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_room_is_never_overrun_and_what_is_too_large_for_it_is_alone():
    room, lock, held, most = DecodingMemory(10), threading.Lock(), [], []

    def work(wanted: int) -> None:
        with room.hold(wanted):
            with lock:
                held.append(wanted)
                most.append(list(held))
            threading.Event().wait(0.001)
            with lock:
                held.remove(wanted)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, [4, 4, 25, 3, 4, 10, 2, 1, 1, 30, 5, 5] * 3))
    assert all(sum(together) <= 10 or len(together) == 1 for together in most)
    assert any(len(together) > 1 for together in most)
