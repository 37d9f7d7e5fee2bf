"""The state of slots as a checkpoint holds it: a few kilobytes each, under the slot's number.

    slot_000017 -> zlib(JSON {"facts": what the order depends on, "slot": SlotState})
    slot_000000    has "shards" too: those of each source in their order, see sources/listing

Everywhere else a state is plain values: numbers, lists and dicts. They become text here, and only when a
checkpoint is made. Which rank or worker runs the slot is no part of it, so a run goes on with any number of
either.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any, TypedDict

PREFIX = "slot_"


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
