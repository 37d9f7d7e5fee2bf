"""The images of a shard, judged, shrunk and encoded, into one file and an index of what became of each.

images/00000.bin    finished images, one after another
images/00000.json   for each image of the shard, in order: where it lies, or why it does not
content/00000.npy   a hash of each
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TypeVar

import numpy as np

from experiments.vlm.data.rejects import Rejected
from experiments.vlm.prepare.dedup import hash_of
from experiments.vlm.prepare.download.journal import Journal
from experiments.vlm.prepare.folder import appearing, read_array, write_array, write_json
from experiments.vlm.prepare.job import Job
from experiments.vlm.prepare.pictures import Encoding, finish
from experiments.vlm.prepare.progress import Advancing
from experiments.vlm.prepare.records.record import Picture, Reference
from experiments.vlm.prepare.stop import Stop

IN_WORK = 64  # images that are read, judged and not yet written
Item = TypeVar("Item")


@dataclass(frozen=True)
class Entry:
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
Work = Future[Picture] | Entry | int


def references(job: Job, number: int) -> Iterator[tuple[Reference, bool]]:
    """The images of a shard, and whether an earlier image of the input has the same URL."""
    repeated = iter(read_array(job.folder.repeated("urls", number), np.bool_)) if job.dedup else None
    for _, record in job.records(number):
        if not isinstance(record, Rejected):
            for image in record.references:
                yield image, repeated is not None and bool(next(repeated))


def write_images(job: Job, number: int, journal: Journal, pool: Executor, progress: Advancing, stop: Stop) -> None:
    """Raises Stopped."""
    entries: list[Entry] = []
    with appearing(job.folder.images(number)) as file:
        for work in ahead(start_works(job, number, journal, pool, progress), IN_WORK):
            stop.check()
            if isinstance(work, Future):
                entries.append(store(work, file))
            else:
                entries.append(entries[work] if isinstance(work, int) else work)
    write_array(job.folder.hashes("content", number), np.array([hash_of(entry.sha256) for entry in entries], np.uint64))
    write_json(job.folder.image_index(number), [asdict(entry) for entry in entries])


def start_works(job: Job, number: int, journal: Journal, pool: Executor, progress: Advancing) -> Iterator[Work]:
    """What a shard names twice is judged and stored once."""
    options = job.options
    encoding = Encoding(options.encode, options.max_side, options.quality)
    first: dict[str, int] = {}
    for index, (image, repeated) in enumerate(references(job, number)):
        if repeated:
            yield Entry(reason="duplicate_url")
        elif image.name in first:
            yield first[image.name]
        elif image.url and journal.outcomes[image.url].reason:
            yield Entry(reason=journal.outcomes[image.url].reason, detail=journal.outcomes[image.url].detail)
        else:
            if image.name:
                first[image.name] = index
            if not image.url:
                progress.advance()
            yield pool.submit(bring, image, journal, options.image_folder, encoding)


def bring(image: Reference, journal: Journal, folder: str, encoding: Encoding) -> Picture:
    """In a thread of the pool. Raises Rejected."""
    if image.data is not None:
        data = image.data
    elif image.url:
        data = journal.read(image.url)
    else:
        data = read_inside(Path(folder), image.path)
    return finish(data, encoding)


def read_inside(folder: Path, name: str) -> bytes:
    """Raises Rejected. A record cannot name a file outside the folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise Rejected("image_outside", name)
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise Rejected("image_missing", f"{name}: {error}") from error


def store(work: Future[Picture], file: IO[bytes]) -> Entry:
    try:
        picture = work.result()
    except Rejected as rejected:
        return Entry(reason=rejected.reason, detail=rejected.detail)
    offset = file.tell()
    file.write(picture.data)
    return Entry(offset, len(picture.data), picture.extension, picture.height, picture.width, picture.sha256)


def ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The same items, each drawn when the one `count` before it is handed out."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting
