"""How a run goes on from the states of its slots, with the shards of then and those that joined; and why not.

In: the states of a checkpoint, or of a run whose sources may have new shards. Out: the deals to go on with,
or what changed, the same on all ranks.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.data.formats.shard import Shard
from experiments.vlm.data.ranks import Ranks, list_for_all
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.setup import Setup, order_facts
from experiments.vlm.data.slot_state import SlotState
from experiments.vlm.data.sources.listing import Continued, go_on, to_text
from experiments.vlm.data.sources.order import Deal
from experiments.vlm.data.sources.shard_cache import difference
from experiments.vlm.data.storage.outages import Retry
from torchtitan.config.errors import ConfigError

MISSING = "not set"
OPENED_AT_A_TIME = 8
Entries = Mapping[int, Mapping[str, Any]]  # slot -> what slot_state.save_states saved of it


def from_checkpoint(entries: Entries, setup: Setup, slots: range, reads: bool, ranks: Ranks) -> Continued:
    """The deals of the run that saved `entries`; its changes are those for the slots of any rank.

    `slots`: of this rank, which looks into their shards if it `reads`.
    """
    deals, join = setup.deals, setup.data.join_new_shards
    furthest = _furthest({slot: entry["slot"] for slot, entry in entries.items()}, deals, ranks)
    continued = ranks.from_first(lambda: _listed_then(entries, deals, furthest, join))
    then = replace(setup, deals=continued.then)
    changes = continued.changes + changes_of(entries, slots, order_facts(then))
    looked_at = slots if reads and not changes else range(0)
    changes += ranks.wait_together(lambda: changed_shards(entries, looked_at, then))
    of_all = dict.fromkeys(change for of_rank in ranks.from_all(changes) for change in of_rank)
    return replace(continued, changes=list(of_all))


def with_new_shards(
    job: VLMJobConfig, deals: tuple[Deal, ...], states: Mapping[int, SlotState], ranks: Ranks
) -> Continued:
    """The deals of a run that goes on, with the shards there are now. `states`: of all slots of this rank."""
    listed = list_for_all(job, "train", ranks)
    if all(set(shards) <= set(deal.shards) for shards, deal in zip(listed, deals, strict=True)):
        return Continued(deals, deals, [], [])
    now = [replace(deal, shards=shards, joins=()) for deal, shards in zip(deals, listed, strict=True)]
    return go_on(now, to_text(deals), _furthest(states, deals, ranks), join=True)


def _listed_then(entries: Entries, deals: tuple[Deal, ...], furthest: Sequence[int], join: bool) -> Continued:
    text = entries.get(0, {}).get("shards")
    return Continued(deals, deals, [], []) if text is None else go_on(deals, text, furthest, join)


def _furthest(states: Mapping[int, SlotState], deals: Sequence[Deal], ranks: Ranks) -> list[int]:
    """The furthest unit of each source, over all slots: see `go_on`. Empty where not all slots are known."""
    if not ranks.together and len(states) < deals[0].slots:
        return []
    units = [0] * len(deals)
    for slot, state in states.items():
        # as many as both have: where sources came or went, the facts say so
        for source, (reader, deal) in enumerate(zip(state["plan"]["readers"], deals, strict=False)):
            units[source] = max(units[source], reader[0] * deal.slots + slot)
    return [max(of_source) for of_source in zip(*ranks.from_all(units), strict=True)]


def changes_of(entries: Entries, slots: Iterable[int], facts: dict[str, Any]) -> list[str]:
    """Why slots cannot go on exactly: what their order depends on is another now, or they have no state."""
    for slot in slots:
        if slot not in entries:
            return [f"the checkpoint has no state of slot {slot}"]
        if changes := differences(entries[slot]["facts"], facts):
            return changes
    return []


def changed_shards(entries: Entries, slots: Iterable[int], setup: Setup) -> list[str]:
    """Shards in hand that hold other records than when the slots read them. One that cannot be opened is not
    among them: its records are rejected when they are read. Raises StorageError where the storage stays away.
    """
    retry = Retry(setup.data.storage_timeout_s)

    def look(item: tuple[tuple[int, int], tuple[int, int]]) -> str:
        (source, number), before = item
        deal = setup.deals[source]
        path = deal.shards[number]
        try:
            now = retry.call(f"shard {path}", lambda: _content(setup.open_shard(source, path)))
        except Rejected:
            return ""
        anew = f"shard {path} of source {deal.name} has been written anew"
        return "" if now == before else f"{anew}: {difference(before, now)}"

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
