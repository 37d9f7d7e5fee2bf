"""The state of slots as a checkpoint holds it: a few kilobytes each, under the slot's number.

    slot_000017 -> zlib(JSON {"facts": what the order depends on, "slot": SlotState})
    slot_000000    has "shards" too: those of each source in their order, see sources/listing

Everywhere else a state is plain values: numbers, lists and dicts. They become text here, and only when a
checkpoint is made. Which rank or worker runs the slot is no part of it, so a run goes on with any number of
either.
"""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

from experiments.vlm.data.formats.shard import Shard
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.sources.order import Deal
from experiments.vlm.data.sources.shard_cache import OpenShard
from experiments.vlm.data.storage.outages import Retry
from torchtitan.config.errors import ConfigError

MISSING = "not set"
PREFIX = "slot_"
OPENED_AT_A_TIME = 8


class SlotState(TypedDict):
    """One slot right after a step. Nobody changes it, so the loader and a later checkpoint may share it."""

    plan: dict[str, Any]  # Slot.position
    delivered: dict[str, Any]  # Tally.snapshot of what reached a batch
    epochs: dict[str, float]  # as in SlotPlan


def slot_key(slot: int) -> str:
    """The name of a slot's state in a checkpoint."""
    return f"{PREFIX}{slot:06d}"


def save_states(states: Mapping[int, SlotState], facts: dict[str, Any], shards: str) -> dict[str, bytes]:
    """Slot -> its state and the facts that its order depends on, as bytes for a checkpoint."""
    entries: dict[int, dict[str, Any]] = {
        slot: {"facts": facts, "slot": state} for slot, state in states.items()
    }
    if 0 in entries:
        entries[0]["shards"] = shards
    return {slot_key(slot): zlib.compress(json.dumps(entry).encode()) for slot, entry in entries.items()}


def read_states(saved: Mapping[str, bytes]) -> dict[int, dict[str, Any]]:
    """Slot -> what `save_states` saved of it."""
    return {int(key.removeprefix(PREFIX)): json.loads(zlib.decompress(entry)) for key, entry in saved.items()}


def changes_of(
    entries: Mapping[int, dict[str, Any]], slots: Iterable[int], facts: dict[str, Any]
) -> list[str]:
    """Why slots cannot go on exactly: what their order depends on is another now, or they have no state."""
    for slot in slots:
        if slot not in entries:
            return [f"the checkpoint has no state of slot {slot}"]
        if changes := differences(entries[slot]["facts"], facts):
            return changes
    return []


def changed_shards(
    entries: Mapping[int, dict[str, Any]],
    slots: Iterable[int],
    deals: Sequence[Deal],
    open_shard: OpenShard,
    retry: Retry,
) -> list[str]:
    """Shards in hand that hold other records than when the slots read them. One that cannot be opened is not
    among them: its records are rejected when they are read. Raises StorageError where the storage stays away.
    """

    def look(item: tuple[tuple[int, int], tuple[int, int]]) -> str:
        (source, number), before = item
        path = deals[source].shards[number]
        try:
            now = retry.call(f"shard {path}", lambda: _content(open_shard(source, path)))
        except Rejected:
            return ""
        return "" if now == before else _rewritten(deals[source].name, path, before[0], now[0])

    held: dict[tuple[int, int], tuple[int, int]] = {}
    for slot in slots:
        for source, shard, records, checksum in entries[slot]["slot"]["plan"].get("contents", ()):
            held[source, shard] = records, checksum
    with ThreadPoolExecutor(OPENED_AT_A_TIME, "compare") as pool:
        return list(filter(None, pool.map(look, held.items())))


def _content(shard: Shard) -> tuple[int, int]:
    content = len(shard), shard.checksum
    shard.close()
    return content


def _rewritten(source: str, path: str, before: int, now: int) -> str:
    held = f"held {before:,} records and holds {now:,}" if now != before else "holds other records"
    return f"shard {path} of source {source} has been written anew: it {held}"


def refuse(changes: Sequence[str]) -> ConfigError:
    """What a user reads of changes."""
    return ConfigError(
        f"the data cannot go on exactly where the checkpoint left it: {'; '.join(changes)}. Change it back, "
        "or set data.resume_changed_data to go on with the weights and start the data anew"
    )


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changed, for people: "data.epochs was 1 and is 2"."""
    # An option that is unset is one that an older checkpoint does not know.
    before, now = ({k: v for k, v in facts.items() if v is not None} for facts in (before, now))
    names = [name for name in before | now if before.get(name, MISSING) != now.get(name, MISSING)]
    return [f"{name} was {before.get(name, MISSING)} and is {now.get(name, MISSING)}" for name in names]
