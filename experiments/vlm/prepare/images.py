"""The images of a shard, judged whole, shrunk and encoded where asked for, into a file and an index.

images/00000.bin    finished images, one after another
images/00000.json   for each image of the shard, in order: where it lies, or why it does not
content/00000.npy   a hash of each
"""

import hashlib
import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from typing import IO, TypeVar

import numpy as np
from PIL import Image as PILImage

from experiments.vlm.data.document import ImageValue
from experiments.vlm.data.formats.image_values import is_address, name_of, plain_value
from experiments.vlm.data.formats.record_shard import ImageFolder
from experiments.vlm.data.image import decode, probe, shrunk
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.prepare.dedup import hash_of
from experiments.vlm.prepare.folder import appearing, read_array, write_array, write_json
from experiments.vlm.prepare.journal import Journal
from experiments.vlm.prepare.options import Options
from experiments.vlm.prepare.progress import ShardProgress
from experiments.vlm.prepare.shard_plan import PrepareJob, retry
from experiments.vlm.prepare.stop import Stop

IN_WORK = 64  # images that are read, judged and not yet written
Item = TypeVar("Item")

# Formats that may stay as they are, with the names that readers of shards know them by. Others become PNG.
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "AVIF": "avif",
    "JPEG2000": "jp2",
}
ENCODED = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
SIDE_LIMITS = {"JPEG": 65500, "WEBP": 16383}  # pixels a side that can be encoded; longer images become PNG
# of images, which Pillow may not open when cut (WebP, AVIF)
BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF")
AVIF = b"ftypavi"  # from the fifth byte on
CHECK_SHRINK = 32  # a check decodes every byte, but to as few pixels as the decoder can


@dataclass(frozen=True)
class FinishedImage:
    """An image as it goes into a shard."""

    data: bytes
    extension: str
    height: int  # pixels as a person sees it, after EXIF orientation
    width: int
    sha256: str  # of the bytes as they came


@dataclass(frozen=True)
class ImageEntry:
    """An image of a shard: where it lies in the .bin file, or (`reason`) why it does not."""

    offset: int = 0
    length: int = 0
    extension: str = ""
    height: int = 0
    width: int = 0
    sha256: str = ""
    reason: str = ""
    detail: str = ""


# An image in work, an image that is not wanted, or the number of an earlier one with the same name.
Work = Future[FinishedImage] | ImageEntry | int


def images_of(job: PrepareJob, number: int) -> Iterator[tuple[ImageValue, bool]]:
    """The images of a shard, and whether an earlier image of the input has the same URL."""
    repeated = iter(read_array(job.folder.repeated("urls", number), np.bool_)) if job.dedup else None
    for _, record in job.records(number):
        if not isinstance(record, Rejected):
            for image in record.draft.images():
                yield image, repeated is not None and bool(next(repeated))


def write_images(
    job: PrepareJob, number: int, journal: Journal, pool: Executor, progress: ShardProgress, stop: Stop
) -> None:
    """Write the images of a shard, and what became of each. Raises Stopped."""
    entries: list[ImageEntry] = []
    with appearing(job.folder.images(number)) as file:
        for work in ahead(start_works(job, number, journal, pool, progress), IN_WORK):
            stop.check()
            if isinstance(work, Future):
                entries.append(store(work, file))
            else:
                entries.append(entries[work] if isinstance(work, int) else work)
    write_array(
        job.folder.hashes("content", number),
        np.array([hash_of(entry.sha256) for entry in entries], np.uint64),
    )
    write_json(job.folder.image_index(number), [asdict(entry) for entry in entries])


def start_works(
    job: PrepareJob, number: int, journal: Journal, pool: Executor, progress: ShardProgress
) -> Iterator[Work]:
    """What a shard names twice is judged and stored once."""
    folder = job.image_folder(number)
    first: dict[str, int] = {}
    for index, (image, repeated) in enumerate(images_of(job, number)):
        name = name_of(image.value)
        if repeated:
            yield ImageEntry(reason="duplicate_url")
        elif name in first:
            yield first[name]
        elif is_address(name) and (failed := journal.outcomes[name]).reason:
            yield ImageEntry(reason=failed.reason, detail=failed.detail)
        else:
            if name:
                first[name] = index
            if not is_address(name):
                progress.advance()
            yield pool.submit(bring, image, journal, folder, job.options)


def bring(image: ImageValue, journal: Journal, folder: ImageFolder, options: Options) -> FinishedImage:
    """Read and finish an image, in a thread of the pool. Raises Rejected, and StorageError of folders."""
    value = plain_value(image.value)
    if isinstance(value, memoryview):
        data = bytes(value)
    elif is_address(value):
        data = journal.read(value)
    else:
        data = retry.call(value, lambda: folder.read(value))
    return finish_image(data, options)


def store(work: Future[FinishedImage], file: IO[bytes]) -> ImageEntry:
    """Waits for the image and appends its bytes; an entry with the reason where it was rejected."""
    try:
        picture = work.result()
    except Rejected as rejected:
        return ImageEntry(reason=rejected.reason, detail=rejected.detail)
    offset = file.tell()
    file.write(picture.data)
    return ImageEntry(
        offset, len(picture.data), picture.extension, picture.height, picture.width, picture.sha256
    )


def ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The same items, each drawn when the one `count` before it is handed out."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def finish_image(data: bytes, options: Options) -> FinishedImage:
    """An image as it goes into a shard: the same bytes where these are what is asked for. Raises Rejected."""
    height, width = probe(data)
    with PILImage.open(io.BytesIO(data)) as image:
        came_as = str(image.format)
    target = shrunk(height, width, options.max_side)
    wanted = ENCODED.get(options.encode, came_as if came_as in EXTENSIONS else "PNG")
    if target == (height, width) and EXTENSIONS[wanted] == EXTENSIONS.get(came_as):
        check(data, height, width)
        out = data
    else:
        if wanted not in ENCODED.values() or max(target) > SIDE_LIMITS.get(wanted, max(target)):
            wanted = "PNG"
        out = encoded(data, target, wanted, options.quality)
    return FinishedImage(out, EXTENSIONS[wanted], *target, hashlib.sha256(data).hexdigest())


def check(data: bytes, height: int, width: int) -> None:
    """Raises Rejected where the image cannot be decoded to its end."""
    decode(data, max(1, height // CHECK_SHRINK), max(1, width // CHECK_SHRINK))


def looks_whole(data: bytes) -> bool:
    """False where an image begins well and does not end, as if its connection broke; else True."""
    try:
        height, width = probe(data)
    except Rejected:
        return bool(data) and not data.startswith(BEGINNINGS) and data[4:11] != AVIF
    try:
        check(data, height, width)
    except Rejected:
        return False
    return True


def encoded(data: bytes, size: tuple[int, int], wanted: str, quality: int) -> bytes:
    """The image at `size` (height, width), in the format `wanted`. Raises Rejected."""
    out = io.BytesIO()
    PILImage.fromarray(decode(data, *size)).save(
        out, wanted, **({} if wanted == "PNG" else {"quality": quality})
    )
    return out.getvalue()
