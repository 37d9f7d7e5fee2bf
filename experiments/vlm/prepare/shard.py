"""The last stage of a shard: its samples into a tar file, and the account of each record and image.

The tar holds the samples in the order of the input with no trace of when and where it was made, so the same
input gives the same bytes, whatever was killed in between and however many machines took part. What makes a
document of a draft, and what it costs where images are lost, is what training does (document.finish).
"""

from collections.abc import Iterator
from itertools import islice
from typing import IO

import numpy as np

from experiments.vlm.data.chat_template import load_chat_template
from experiments.vlm.data.document import ImageValue, finish
from experiments.vlm.data.formats.image_values import is_address, name_of
from experiments.vlm.data.rejects import Reject, Rejected
from experiments.vlm.data.report import Tally
from experiments.vlm.prepare.folder import appearing, read_array, read_json, remove, write_json
from experiments.vlm.prepare.images import FinishedImage, ImageEntry
from experiments.vlm.prepare.records import MEMBERS, Members, to_json
from experiments.vlm.prepare.shard_plan import Parsed, PrepareJob
from experiments.vlm.tar_file import write_samples

Judged = FinishedImage | ImageEntry  # an entry says why there is no image


def write_shard(job: PrepareJob, number: int) -> None:
    """Write a shard. Its report is written last and says that it is finished. Idempotent."""
    folder = job.folder
    if not folder.done(number).exists():
        account = Account(job.plan.format, job.plan.pieces[number].file)
        with appearing(folder.tar(number)) as file:
            write_samples(file, samples(job, number, account))
        if not account.tally.of(account.source)["counts"].get("samples"):
            remove(folder.tar(number))
        with appearing(folder.rejects(number)) as file:
            file.writelines(to_json(reject.line()) + b"\n" for reject in account.rejects)
        write_json(folder.done(number), account.tally.sources)
    for leftover in (folder.journal(number), folder.images(number), folder.image_index(number)):
        remove(leftover)


class Account:
    """What became of the records of one shard."""

    def __init__(self, source: str, file: str):
        self.source, self.file = source, file
        self.tally = Tally()
        self.rejects: list[Reject] = []

    def reject(self, rejected: Rejected, key: str, image: int | None = None) -> None:
        """Count what is not used, and note it. `key`: its record; `image`: which of the record's, if one."""
        self.rejects.append(Reject(self.source, self.file, key, rejected.reason, rejected.detail, image))
        self.tally.reject(self.rejects[-1])

    def keep(self, members: Members, images: int) -> None:
        """Count a sample that is written."""
        for what, more in (("samples", 1), ("images", images), ("bytes", sum(map(len, members.values())))):
            self.tally.count(self.source, what, more)


def samples(job: PrepareJob, number: int, account: Account) -> Iterator[Members]:
    """Members of the shard's records in order; those that give none are accounted for."""
    with job.folder.images(number).open("rb") as file:
        outcomes = read_images(job, number, file)
        for key, record in job.records(number):
            if isinstance(record, Rejected):
                account.reject(record, key)
            elif members := sample(record, key, list(islice(outcomes, len(record.draft.images()))), account):
                yield members
    if tail := job.tail(number):
        account.reject(tail, "")


def sample(parsed: Parsed, key: str, outcomes: list[Judged], account: Account) -> Members | None:
    """The members of a record's sample; None, and accounted for, where nothing worth keeping is left."""
    by_position = dict(zip((image.position for image in parsed.draft.images()), outcomes, strict=True))

    def size(value: ImageValue) -> tuple[int, int]:
        outcome = by_position[value.position]
        if isinstance(outcome, ImageEntry):
            address = name_of(value.value)
            raise Rejected(
                outcome.reason, ": ".join(filter(None, (address * is_address(address), outcome.detail)))
            )
        return outcome.height, outcome.width

    try:
        # A conversation is judged by its turns; any template that shows them all will do.
        draft = load_chat_template("chatml").speak(parsed.draft)
        document, lost = finish(draft, key, size, lambda value: (value, by_position[value.position]))
    except Rejected as rejected:
        account.reject(rejected, key)
        return None
    for image in lost:
        account.reject(image, key, image.image or 0)
    members = MEMBERS[account.source](parsed.record, document, key)
    account.keep(members, len(by_position) - sum(isinstance(outcome, ImageEntry) for outcome in outcomes))
    return members


def read_images(job: PrepareJob, number: int, file: IO[bytes]) -> Iterator[Judged]:
    """What became of each image of the shard, in order."""
    entries = [ImageEntry(**entry) for entry in read_json(job.folder.image_index(number))]
    none = np.zeros(len(entries), np.bool_)
    repeated = read_array(job.folder.repeated("content", number), np.bool_) if job.dedup else none
    for entry, is_repeated in zip(entries, repeated, strict=True):
        if entry.reason:
            yield entry
        elif is_repeated:
            yield ImageEntry(reason="duplicate_content", detail=f"sha256 {entry.sha256}")
        else:
            file.seek(entry.offset)
            yield FinishedImage(
                file.read(entry.length), entry.extension, entry.height, entry.width, entry.sha256
            )
