"""The first stage of a shard: a hash of each image's URL, for the deduplication before anything is fetched."""

import numpy as np

from experiments.vlm.data.rejects import Rejected
from experiments.vlm.prepare.dedup import url_hash
from experiments.vlm.prepare.folder import write_array
from experiments.vlm.prepare.job import Job


def list_urls(job: Job, number: int) -> None:
    """Idempotent. 0 stands for an image that has no URL."""
    path = job.folder.hashes("urls", number)
    if not path.exists():
        records = (record for _, record in job.records(number) if not isinstance(record, Rejected))
        write_array(path, np.array([url_hash(image.url) for record in records for image in record.references], np.uint64))
