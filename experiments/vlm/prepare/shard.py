"""The last stage of a shard: its samples into a tar file, and the account of what became of each record and image.

The tar holds the samples in the order of the input with no trace of when and where it was made, so the same input gives
the same bytes, whatever was killed in between and however many machines took part.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import IO

import numpy as np

from experiments.vlm.data.rejects import Rejected
from experiments.vlm.prepare.folder import appearing, read_array, read_json, remove, write_json
from experiments.vlm.prepare.images import Entry
from experiments.vlm.prepare.job import Job
from experiments.vlm.prepare.records import Record
from experiments.vlm.prepare.records.record import Picture, to_json
from experiments.vlm.prepare.tally import Tally
from experiments.vlm.tar_file import write_samples


def write_shard(job: Job, number: int) -> None:
    """Idempotent. The report is written last and says that the shard is finished."""
    folder = job.folder
    if not folder.done(number).exists():
        tally = Tally()
        with appearing(folder.tar(number)) as file:
            write_samples(file, samples(job, number, tally))
        if not tally.written["records"]:
            remove(folder.tar(number))
        with appearing(folder.rejects(number)) as file:
            file.writelines(to_json(line) + b"\n" for line in tally.lines)
        write_json(folder.done(number), tally.report())
    for leftover in (folder.journal(number), folder.images(number), folder.image_index(number)):
        remove(leftover)


def samples(job: Job, number: int, tally: Tally) -> Iterator[Mapping[str, bytes]]:
    with job.folder.images(number).open("rb") as file:
        pictures = read_pictures(job, number, file)
        for key, record in job.records(number):
            if isinstance(record, Rejected):
                tally.reject("records", key, record.reason, record.detail)
                continue
            found = list(islice(pictures, len(record.references)))
            try:
                members = job.kind.members(record, key, [picture if isinstance(picture, Picture) else None for picture in found])
            except Rejected as rejected:
                members = {}
                tally.reject("records", key, rejected.reason, rejected.detail)
            account(record, key, found, bool(members), tally)
            if members:
                tally.keep("records", sum(map(len, members.values())))
                yield members


def read_pictures(job: Job, number: int, file: IO[bytes]) -> Iterator[Picture | Entry]:
    """For each image of the shard, in order, its picture, or an entry that says why there is none."""
    entries = [Entry(**entry) for entry in read_json(job.folder.image_index(number))]
    repeated = read_array(job.folder.repeated("content", number), np.bool_) if job.dedup else np.zeros(len(entries), bool)
    for entry, is_repeated in zip(entries, repeated, strict=True):
        if entry.reason:
            yield entry
        elif is_repeated:
            yield Entry(reason="duplicate_content", detail=f"sha256 {entry.sha256}")
        else:
            file.seek(entry.offset)
            yield Picture(file.read(entry.length), entry.extension, entry.height, entry.width, entry.sha256)


def account(record: Record, key: str, found: list[Picture | Entry], kept: bool, tally: Tally) -> None:
    """Of each image of a record."""
    for reference, picture in zip(record.references, found, strict=True):
        if isinstance(picture, Entry):
            tally.reject("images", key, picture.reason, picture.detail, reference.name)
        elif kept:
            tally.keep("images")
        else:
            tally.reject("images", key, "record_rejected", "the image is good", reference.name)
