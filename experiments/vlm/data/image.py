"""Image bytes in, uint8 patches and their coordinates out.

    probe(data)                    height and width from the header
    decode_views(data, layout, plan)  the pixels of its views, as image_plan.py plans them
    decode(data, height, width)    all of the image at that size
    write_patches(...)             pixels -> the batch contract's order

Pillow is the judge: what it opens, loads and converts is good, whatever the file is called, and everything
else is Rejected. JPEGs, nearly all of the data, are decoded by libjpeg-turbo instead (simplejpeg), and every
image is resized by one of torch's antialiased kernels, both without the interpreter lock; the result stays
above 50 dB PSNR of Pillow's own, and above 70 dB on photographs where the kernel is bicubic.

Colours and transparency: rgb.py. The first frame of an animation counts.

Memory: a thread keeps up to 48 MB to decode into, and takes about 40 MB besides. Images above a megapixel
share DECODING_BYTES of the process, counted by what their decoders were measured to hold; one that needs more
is decoded when no other is. So they take no more than that, or what one image at Pillow's limit (179
megapixels) takes: 0.8 GB as a PNG, 1.8 as a progressive JPEG, 2.9 as a WebP, 3.5 as a JPEG 2000.
"""

import contextlib
import io
import math
import re
import threading
import warnings
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags
from PIL import Image as PILImage

from experiments.vlm.batch import EXTRA, FIELDS
from experiments.vlm.data.decoding_memory import DecodingMemory
from experiments.vlm.data.image_layout import Layout, View
from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.data.jpeg_header import plain_jpeg_size
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.rgb import Rgb
from experiments.vlm.model.config import Resample

HEAD_BYTES = 1 << 16  # enough for the header of nearly every JPEG
# a decoding thread keeps a buffer for images up to here; larger ones allocate their own
KEPT_PIXELS = 16_000_000
LARGE_PIXELS = 6_000_000  # a JPEG from here on may lose a little quality to scaled decoding
DECODING_BYTES = 1 << 30  # held at most by the images that the threads of a process are decoding
COUNTED_PIXELS = 1_000_000  # smaller images do not count for that
# Pillow at its peak, as measured; what the fast JPEG decoder takes: `_memory_for_jpeg`
BYTES_A_PIXEL = {"other": 8, "JPEG": 10, "MPO": 10, "AVIF": 10, "WEBP": 17, "JPEG2000": 20}
# Kernels for which speed counts more than the last bit, down to 50 dB: whole rows are added up first, which
# leaves fewer for the slow pass (a third faster than at once), and JPEGs may be shrunk by their decoder. The
# others do as Pillow does, which goes along rows first and rounds in between: 72 dB to it, not 57.
FAST = ("bilinear",)
PROGRESSIVE = b"\xff\xc2"  # the marker of a JPEG whose coefficients the decoder holds, 6 bytes a pixel

PILImage.init()
# malloc gives blocks above 32 MB back to the system when they are freed; a thread that ever decoded a large
# image would keep all the smaller ones that it took.
PILImage.core.set_block_size(64 << 20)
# The usual ones first, since some plugins find out by trying. EPS would start an external program
# (Ghostscript) on a dataset's bytes.
OPENED_FORMATS = sorted(
    set(PILImage.ID) - {"EPS"}, key=lambda name: (name not in ("JPEG", "PNG", "WEBP", "GIF"), name)
)
# warnings about broken metadata and large images, which are rejected or fine
warnings.filterwarnings("ignore", module=r"PIL\.")

_buffers = threading.local()
_memory = DecodingMemory(DECODING_BYTES)
# torch.nn.functional.interpolate(antialias=True), with scales of one's own
_RESAMPLE = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa,
}
_PILLOW = {"bilinear": PILImage.Resampling.BILINEAR, "bicubic": PILImage.Resampling.BICUBIC}


def probe(data: bytes) -> tuple[int, int]:
    """(height, width) after EXIF orientation, from the header alone. Raises Rejected."""
    if size := plain_jpeg_size(data):
        return size
    image = _open(data)
    with _memory_for(image):  # the orientation of a PNG may stand behind its pixels
        turned = _orientation(image, data) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


def probe_lazily(read: Callable[[int], bytes], size: int) -> tuple[int, int]:
    """`probe` of an image of `size` bytes, whose first n bytes `read(n)` gives: a JPEG needs only some."""
    head = read(min(size, HEAD_BYTES))
    if len(head) < size:
        if head.startswith(b"\xff\xd8"):
            try:
                return probe(head)
            except Rejected:
                pass  # metadata longer than the head
        head = read(size)
    return probe(head)


def shrunk(height: int, width: int, max_side: int) -> tuple[int, int]:
    """Height and width of at most `max_side` (0: any), never enlarged, never less than a pixel."""
    scale = max_side / max(height, width) if max_side else 1.0
    if scale >= 1:
        return height, width
    return max(1, round(height * scale)), max(1, round(width * scale))


def decode_views(data: bytes, layout: Layout, plan: ImagePlan) -> list[np.ndarray]:
    """Pixels uint8 [h * patch_size, w * patch_size, 3] of each view of an image. Raises Rejected."""
    # A picture of which several are parts is made once.
    pictures: dict[object, np.ndarray] = {}
    for view in layout.views:
        if view.picture not in pictures:
            pictures[view.picture] = _picture(data, view, plan)
    return [_part(pictures[view.picture], view, plan) for view in layout.views]


def _picture(data: bytes, view: View, plan: ImagePlan) -> np.ndarray:
    """The picture that a view is a part of. Raises Rejected."""
    if view.box:  # no kernel of torch takes a part that begins between two pixels
        whole, (top, left, bottom, right) = PILImage.fromarray(decode(data, *probe(data))), view.box
        box, kernel = (left, top, right, bottom), _PILLOW[plan.resample]
        pixels = np.asarray(whole.resize(view.size[::-1], kernel, box))
    else:
        pixels = decode(data, *view.size, plan.resample)
    if view.canvas is None:
        return pixels
    height, width, fill, side = view.canvas
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = fill
    top, left = (height - view.size[0]) // 2, (width - view.size[1]) // 2
    canvas[top : top + view.size[0], left : left + view.size[1]] = pixels
    return canvas if side is None else _resize(canvas, (height, width), (side, side), plan.resample)


def _part(pixels: np.ndarray, view: View, plan: ImagePlan) -> np.ndarray:
    (top, left), height, width = view.corner, view.h * plan.patch_size, view.w * plan.patch_size
    return pixels[top : top + height, left : left + width]


def decode(data: bytes, height: int, width: int, kernel: Resample = "bilinear") -> np.ndarray:
    """Pixels uint8 [height, width, 3], contiguous: oriented, RGB, antialiased. Raises Rejected."""
    size, plain = (height, width), plain_jpeg_size(data)
    if plain:
        with _memory_for_jpeg(data, plain, jpeg_factor(plain, size, kernel)):
            resized = _decode_fast(data, plain, size, kernel)
        if resized is not None:
            return resized
    image = _open(data)
    with _memory_for(image):
        try:
            return _decode_opened(image, data, bool(plain), size, kernel)
        except Rejected as rejected:
            why = rejected.reason, rejected.detail
        finally:
            del image  # before another takes its memory
    raise Rejected(*why)  # anew: the first one's frames hold the image


def _decode_opened(
    image: PILImage.Image, data: bytes, tried: bool, size: tuple[int, int], kernel: Resample
) -> np.ndarray:
    """tried: whether the fast decoder complained of it. Raises Rejected."""
    orientation = _orientation(image, data)
    target = (size[1], size[0]) if orientation >= 5 else size
    resized = None
    if not tried and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        resized = _decode_fast(data, (image.height, image.width), target, kernel)
    return _orient(_load_resized(image, target, kernel) if resized is None else resized, orientation)


def write_patches(image: np.ndarray, plan: ImagePlan, out_patches: np.ndarray, out_thw: np.ndarray) -> None:
    """Write an image uint8 [H, W, 3] as patches, '(h m1 ph) (w m2 pw) c -> (h w m1 m2) (ph pw c)', with
    coordinates.

    out_patches: uint8 [n, D], contiguous, n = H * W / patch_size^2, and the plan's extra cells behind them.
    out_thw: int32 [n, 3], (0, h, w) of each patch.
    """
    patch, m = plan.patch_size, plan.merge_size
    h, w = (side // (patch * m) for side in image.shape[:2])
    if plan.extra:
        count = h * w * m * m
        _write_extra(plan, out_patches[count:], out_thw[count:])
        out_patches, out_thw = out_patches[:count], out_thw[:count]
    # One row of pixels of one patch moves as a single value of patch * 3 bytes.
    strip = np.dtype(f"V{patch * 3}")
    rows = np.ascontiguousarray(image).reshape(image.shape[0], -1).view(strip)
    np.copyto(
        out_patches.view(strip).reshape(h, w, m, m, patch),
        rows.reshape(h, m, patch, w, m).transpose(0, 3, 1, 4, 2),
    )
    coordinates = out_thw.reshape(h, w, m, m, 3)
    coordinates[..., 0] = 0
    coordinates[..., 1] = np.arange(h * m).reshape(h, 1, m, 1)
    coordinates[..., 2] = np.arange(w * m).reshape(1, w, 1, m)


def _write_extra(plan: ImagePlan, patches: np.ndarray, thw: np.ndarray) -> None:
    """Cells of class token and registers, and padding up to a whole group."""
    patches[:] = FIELDS["pixel_values"].padding
    thw[:] = FIELDS["grid_thw"].padding
    thw[: plan.extra] = 0, EXTRA, EXTRA


def _open(data: bytes) -> PILImage.Image:
    if not data:
        raise Rejected("image_empty")
    try:
        return PILImage.open(io.BytesIO(data), formats=OPENED_FORMATS)
    except PILImage.DecompressionBombError as error:
        raise Rejected("image_too_large", str(error)) from error
    except Exception as error:  # a decoder may raise anything on broken bytes
        # A WebP says how long it is, and Pillow only that it cannot be opened.
        cut = data.startswith(b"RIFF") and len(data) < int.from_bytes(data[4:8], "little") + 8
        raise _rejected(error, cut) from error


def _orientation(image: PILImage.Image, data: bytes) -> int:
    """EXIF orientation, 1 to 8. Broken metadata costs no image."""
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    if image.format == "PNG" and not any(
        mark in data for mark in (b"eXIf", b"Raw profile type", b"com.adobe.xmp")
    ):
        return 1  # without looking, Pillow would decode the whole image in search of a late chunk
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except PILImage.DecompressionBombError as error:
        raise Rejected("image_too_large", str(error)) from error
    except Exception:
        return 1
    return value if value in range(1, 9) else 1


def _orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _decode_fast(
    data: bytes, size: tuple[int, int], target: tuple[int, int], kernel: Resample
) -> np.ndarray | None:
    """None where libjpeg-turbo complains of anything: then Pillow decides."""
    factor = jpeg_factor(size, target, kernel)
    height, width = (math.ceil(side / factor) for side in size)
    buffer = _buffer(height * width * 3)
    try:
        pixels = simplejpeg.decode_jpeg(
            data, min_height=height, min_width=width, min_factor=factor, buffer=buffer
        )
    except (ValueError, RuntimeError):
        return None
    return _resize(pixels, (size[0] / factor, size[1] / factor), target, kernel)


def jpeg_factor(size: tuple[int, int], target: tuple[int, int], kernel: Resample = "bilinear") -> int:
    """By which power of two the decoder may shrink in the DCT domain: 1, 2, 4 or 8.

    The margin is what is left to the antialiased resize. Seen on photographs at their true resolution: four
    times the target keeps at least 50 dB PSNR to Pillow's resize of the whole image, twice at least 44 dB.
    Kernels outside FAST shrink nothing.
    """
    if kernel not in FAST:
        return 1
    margin = 2 if size[0] * size[1] >= LARGE_PIXELS else 4
    room = min(size[0] / target[0], size[1] / target[1]) / margin
    return next((factor for factor in (8, 4, 2) if room >= factor), 1)


def _buffer(size: int) -> np.ndarray:
    """Bytes to decode into, kept by each thread: fresh memory would cost a page fault every 4 KB."""
    if size > KEPT_PIXELS * 3:
        return np.empty(size, np.uint8)
    kept = getattr(_buffers, "decoded", None)
    if kept is None or kept.size < size:
        kept = _buffers.decoded = np.empty(size, np.uint8)
    return kept[:size]


def _memory_for(image: PILImage.Image) -> contextlib.AbstractContextManager[None]:
    pixels = image.width * image.height
    if pixels < COUNTED_PIXELS:
        return contextlib.nullcontext()
    return _memory.hold(pixels * BYTES_A_PIXEL.get(image.format or "", BYTES_A_PIXEL["other"]))


def _memory_for_jpeg(
    data: bytes, size: tuple[int, int], factor: int
) -> contextlib.AbstractContextManager[None]:
    """For the fast decoder, which shrinks by `factor`."""
    pixels = size[0] * size[1]
    if pixels < COUNTED_PIXELS:
        return contextlib.nullcontext()
    return _memory.hold(3 * pixels // factor**2 + (6 * pixels if PROGRESSIVE in data else 0))


def _resize(
    pixels: np.ndarray, extent: tuple[float, float], target: tuple[int, int], kernel: Resample = "bilinear"
) -> np.ndarray:
    """Antialiased resize of uint8 [H, W, 3] to target (height, width).

    extent: the part of (H, W) that the image truly covers. A JPEG of 1001 rows, decoded at half size, has 501
    rows but covers 500.5 of them; stretching 501 over the target instead would cost 10 dB.
    """
    resample = _RESAMPLE[kernel]
    # to torch channels last: nothing is copied
    image = torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)
    down, across = (goal / covered for goal, covered in zip(target, extent, strict=True))
    if down < 1 and kernel in FAST:
        image = resample(image, [target[0], image.shape[3]], False, down, None)
        down = 1.0
    return resample(image, list(target), False, down, across)[0].permute(1, 2, 0).numpy()


def _load_resized(image: PILImage.Image, target: tuple[int, int], kernel: Resample) -> np.ndarray:
    """uint8 [*target, 3] of any image that Pillow loads. Raises Rejected."""
    try:
        return _resize_by_strips(Rgb(image), target, kernel)
    except PILImage.DecompressionBombError as error:
        raise Rejected("image_too_large", str(error)) from error
    except Exception as error:  # a decoder may raise anything on broken bytes
        raise _rejected(error) from error


def _resize_by_strips(image: Rgb, target: tuple[int, int], kernel: Resample) -> np.ndarray:
    """The pixels that `_resize` would make of all at once: first along the strips, then across them."""
    down = target[0] < image.height and kernel in FAST
    boxes, axis = (image.columns(), 1) if down else (image.rows(), 0)
    strips = []
    for box in boxes:
        strip = image.box(box)
        along = (target[0], strip.shape[1]) if axis == 1 else (strip.shape[0], target[1])
        strips.append(_resize(strip, strip.shape[:2], along, kernel))
    pixels = np.concatenate(strips, axis)
    return _resize(pixels, pixels.shape[:2], target, kernel)


def _rejected(error: Exception, cut: bool = False) -> Rejected:
    cut = cut or isinstance(error, EOFError) or "truncated" in str(error).lower()
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    # Not where in memory the bytes were: the same data gives the same report.
    return Rejected(
        "image_truncated" if cut else "image_undecodable",
        re.sub(r" <_io\.BytesIO object at \w+>", "", line)[:200],
    )
