"""The state of slots as a checkpoint holds it: a few kilobytes each, under the slot's number.

    slot_000017 -> zlib(JSON {"facts": what the order depends on, "slot": SlotState})

Everywhere else a state is plain values: numbers, lists and dicts. They become text here, and only when a
checkpoint is made.
Which rank or worker runs the slot is no part of it, so a run goes on with any number of either.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from torchtitan.config.errors import ConfigError
from torchtitan.tools.logging import logger

MISSING = "not set"


class SlotState(TypedDict):
    """One slot right after a step. Nobody changes it, so the loader and a later checkpoint may share it."""

    plan: dict[str, Any]  # Slot.position
    delivered: dict[str, Any]  # Tally.snapshot of what reached a batch
    epochs: dict[str, float]  # as in SlotPlan


def slot_key(slot: int) -> str:
    return f"slot_{slot:06d}"


def save_states(states: Mapping[int, SlotState], facts: dict[str, Any]) -> dict[str, bytes]:
    """Slot -> its state and the facts that its order depends on, as bytes for a checkpoint."""
    entries = {slot_key(slot): {"facts": facts, "slot": state} for slot, state in states.items()}
    return {key: zlib.compress(json.dumps(entry).encode()) for key, entry in entries.items()}


def load_states(
    saved: Mapping[str, bytes], slots: Iterable[int], facts: dict[str, Any], anew: bool
) -> dict[int, SlotState]:
    """The state of each slot; none where the data starts anew.

    Raises ConfigError if it cannot go on exactly, unless `anew`.
    """
    states = {}
    for slot in slots:
        if slot_key(slot) not in saved:
            changes = [f"the checkpoint has no state of slot {slot}"]
        else:
            entry = json.loads(zlib.decompress(saved[slot_key(slot)]))
            changes = differences(entry["facts"], facts)
            states[slot] = entry["slot"]
        if changes and not anew:
            raise ConfigError(
                f"the data cannot go on exactly where the checkpoint left it: {'; '.join(changes)}. Change "
                "it back, or set "
                f"data.resume_changed_data to go on with the weights and start the data anew"
            )
        if changes:
            logger.warning(f"the data starts anew (data.resume_changed_data): {'; '.join(changes)}")
            return {}
    return states


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changed, for people: "data.epochs was 1 and is 2"."""
    names = [name for name in before | now if before.get(name, MISSING) != now.get(name, MISSING)]
    return [f"{name} was {before.get(name, MISSING)} and is {now.get(name, MISSING)}" for name in names]
