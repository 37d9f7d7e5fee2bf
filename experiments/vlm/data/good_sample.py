"""A source without one good sample is an error: it would leave the mixture, and the run would go on.

Looked for before training, and again where a slot has read a source for long and met none. A good sample is
one that would be delivered: it can be read, it is not dropped for its length, and a caption's images can be
decoded.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np

from experiments.vlm.data.document import Document, Image
from experiments.vlm.data.formats.shard import Shard
from experiments.vlm.data.image import decode_views
from experiments.vlm.data.rejects import Reject, Rejected
from experiments.vlm.data.sample import make_sample
from experiments.vlm.data.setup import Setup
from experiments.vlm.data.sources.shard_cache import ShardCache, guarded
from experiments.vlm.data.split import Splitter
from experiments.vlm.data.storage.outages import Retry
from torchtitan.config.errors import DataError

SHARDS = 8  # looked into, spread over all of them
RECORDS = 1000  # tried in these together, spread over each
UNREADABLE = 64  # shards tried, where none can be opened
UNREACHED = 64  # records whose address does not answer: each may take data.url_timeout_s


def require_good_sample(setup: Setup, cache: ShardCache, source: int, first: int = 0) -> None:
    """Raises DataError where the source has no good sample. `first`: the shard to begin with."""
    found: list[Reject] = []
    unreached = 0
    for reject in _tried(setup, cache, source, first):
        if reject is None:
            return
        found.append(reject)
        unreached += reject.reason == "image_fetch"
        if unreached == UNREACHED:
            break
    deal = setup.deals[source]
    shard = next((reject.shard for reject in found if reject.kind == "samples"), None)
    hint = setup.hint(source, shard) if shard else ""
    raise DataError(complaint(deal.name, len(deal.shards), found, hint))


def _tried(setup: Setup, cache: ShardCache, source: int, first: int) -> Iterator[Reject | None]:
    """What is wrong with each record and shard that is tried; None for a good record."""
    deal, looked_into = setup.deals[source], 0
    for number in dict.fromkeys([first, *spread(len(deal.shards), UNREADABLE)]):
        path = deal.shards[number]
        try:
            rejects, records = cache.use(source, path, lambda shard: (shard.rejects, len(shard)))
        except Rejected as rejected:
            yield Reject(deal.name, path, "", rejected.reason, rejected.detail)
            continue
        for wrong in rejects:
            yield Reject(deal.name, path, "", wrong.reason, wrong.detail)
        for record in spread(records, RECORDS // min(SHARDS, len(deal.shards))):
            yield cache.use(source, path, partial(_try, setup, deal.name, path, record))
        looked_into += 1
        if looked_into == SHARDS:
            return


def _try(setup: Setup, name: str, path: str, record: int, shard: Shard) -> Reject | None:
    try:
        document, _ = guarded(shard.read, record)
        _use(setup, document, shard)
    except Rejected as rejected:
        return Reject(name, path, key_of(shard, record), rejected.reason, rejected.detail)
    return None


def _use(setup: Setup, document: Document, shard: Shard) -> None:
    """Raises Rejected."""
    plan = setup.plan
    if setup.data.long_documents == "drop":
        splitter = Splitter(setup.budget, plan.merge_size)
        if not splitter.holds(make_sample(document, setup.tokenizer, plan).outline):
            raise Rejected("too_long")
    images = [part for part in document.parts if isinstance(part, Image)] if document.caption else []
    for image in images:
        layout = plan.layout(image.height, image.width)
        guarded(decode_views, guarded(shard.load, image), layout, plan)


def require_good_samples(setups: Iterable[Setup], slot: int) -> None:
    """Raises DataError for the first source that has none, StorageError where that cannot be known.

    Begins with the shard that this slot reads first.
    """
    for setup in setups:
        cache = ShardCache(setup.open_shard, 1, Retry(setup.data.storage_timeout_s))
        for source, deal in enumerate(setup.deals):
            unit = deal.unit(slot, 0)
            require_good_sample(setup, cache, source, unit.shard if unit else 0)


def spread(count: int, most: int) -> list[int]:
    """At most so many of range(count), from the first to the last."""
    return np.linspace(0, count - 1, min(count, most)).astype(int).tolist()


def key_of(shard: Shard, record: int) -> str:
    """The record's key, or its number where the shard cannot say."""
    try:
        return guarded(shard.key, record)
    except Rejected:
        return f"record {record}"


def complaint(name: str, shards: int, found: list[Reject], hint: str = "") -> str:
    """One line: what was tried, why nothing of it is good, the commonest reason first, an example of that."""
    samples = sum(reject.kind == "samples" for reject in found)
    reasons = Counter(reject.reason for reject in found).most_common()
    mend = f"{hint or 'correct it'}, or take it out of the mixture"
    if not reasons:
        return f"source {name}: no record in its {shards:,} shards; {mend}"
    tried = f"its {shards:,} shards can be read"
    if samples:
        tried = f"the {samples:,} samples that were tried is good"
    counted = ", ".join(f"{reason} {count:,}" for reason, count in reasons)
    example = next(reject for reject in found if reject.reason == reasons[0][0])
    place = f"shard {example.shard}" + (f", sample {example.key}" if example.key else "")
    return f"source {name}: none of {tried} ({counted}); for example {place}: {example}; {mend}"
