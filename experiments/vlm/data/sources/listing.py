"""Which shards a run deals: at its first start those that are listed, later the same ones and what joined.

first start    the shards that are listed, sorted
later starts   the same ones in the same order, wherever they lie now; one that is gone stops the run, and
               so does a new one, unless new ones may join: then they are dealt from the first epoch on that
               no slot has begun, behind the others, so that nothing that was dealt changes
"""

import base64
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from experiments.vlm.data.sources.order import Deal

NAMED = 3  # shards in a line


@dataclass(frozen=True)
class Continued:
    """The deals of a run that goes on."""

    then: tuple[Deal, ...]  # as the checkpoint has them, as far as the shards are there
    now: tuple[Deal, ...]  # with the shards that join
    changes: list[str]  # why it cannot go on, in words; empty where it can
    joined: list[str]  # what joins, in words


def to_text(deals: Sequence[Deal]) -> str:
    """Shards and joins of each source, for a checkpoint: a few bytes a shard."""
    listed = {deal.name: [deal.shards, deal.joins] for deal in deals}
    return base64.b85encode(zlib.compress(json.dumps(listed).encode())).decode()


def go_on(deals: Sequence[Deal], text: str, furthest: Sequence[int], join: bool) -> Continued:
    """From the shards that are listed now to those of the run.

    text: as `to_text` made it. furthest: of each source the last unit in the list of all (order.py) that any
    slot has begun, n * G + s for unit n of slot s; wanted where new shards may `join`.
    """
    saved = json.loads(zlib.decompress(base64.b85decode(text)))
    then: list[Deal] = []
    now: list[Deal] = []
    changes: list[str] = []
    joined: list[str] = []
    names = [deal.name for deal in deals]
    if names != list(saved) and sorted(names) == sorted(saved):  # a slot knows them by their places
        changes.append(f"the sources were {', '.join(saved)} and are {', '.join(names)}: their order")
    for source, deal in enumerate(deals):
        shards, joins = saved.get(deal.name, (deal.shards, deal.joins))
        old, wrong = _as_it_was(deal, shards, joins)
        further = old
        new = [] if wrong else sorted(set(deal.shards) - set(old.shards))
        if new and not join:
            old = further = replace(deal, joins=old.joins)
            changes.append(
                f"source {deal.name} has {_named(new)} more; data.join_new_shards lets new shards in with "
                "the next epoch"
            )
        elif new and not furthest:
            changes.append(f"source {deal.name}: whether new shards can join, the states of all slots say")
        elif new:
            further, line = _joined(old, new, furthest[source])
            joined.append(line)
        then.append(old)
        now.append(further)
        changes += wrong
    return Continued(tuple(then), tuple(now), changes, joined)


def _as_it_was(deal: Deal, shards: Sequence[str], joins: Sequence[Sequence[int]]) -> tuple[Deal, list[str]]:
    """With the shards of the checkpoint, by their paths, or by their names where they lie elsewhere."""
    names = {PurePosixPath(path).name: path for path in deal.shards}
    are_unique = len(names) == len(deal.shards)
    if set(shards) <= set(deal.shards):
        found = list(shards)
    else:
        found = [names.get(PurePosixPath(path).name, "") if are_unique else "" for path in shards]
    gone = [path for path, place in zip(shards, found, strict=True) if not place]
    if not gone and len(set(found)) == len(found):
        return replace(deal, shards=tuple(found), joins=tuple((epoch, count) for epoch, count in joins)), []
    if not are_unique and Counter(map(_name, shards)) == Counter(map(_name, deal.shards)):
        return deal, []  # they lie elsewhere, under names that are not theirs alone: their order decides
    return deal, [f"source {deal.name} has lost {_named(gone)}"]


def _joined(deal: Deal, new: list[str], furthest: int) -> tuple[Deal, str]:
    number, slot = divmod(furthest, deal.slots)
    epoch = deal.epoch(slot, number) + 1
    if deal.epochs is not None and (epoch >= deal.epochs or number >= deal.last_round[0]):
        return deal, f"source {deal.name}: {_named(new)} came too late, the last epoch has begun"
    joins = [join for join in deal.joins or ((0, len(deal.shards)),) if join[0] < epoch]
    shards = (*deal.shards, *new)
    line = f"source {deal.name}: {_named(new)} more from epoch {epoch + 1} on"
    return replace(deal, shards=shards, joins=(*joins, (epoch, len(shards)))), line


def _name(path: str) -> str:
    return PurePosixPath(path).name


def _named(shards: Sequence[str]) -> str:
    some = ", ".join(map(_name, shards[:NAMED])) + (", ..." if len(shards) > NAMED else "")
    return f"{len(shards):,} shard{'s' if len(shards) > 1 else ''} ({some})"
