"""What became of the samples of each source: delivered, cut, rejected and why. Adds up over ranks."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.vlm.data.rejects import Reject, meaning
from experiments.vlm.data.slot_state import SlotState
from torchtitan.config.errors import DataError

KINDS = ("samples", "images", "shards")
EXAMPLES = 3  # of each reason that are kept
JUDGED_FROM = 1000  # samples of a source before data.max_bad_fraction is applied


class Tally:
    """Counts of each source, in plain values that JSON can hold:

    {source: {"counts": {what: how many},
              "rejected": {"samples" | "images" | "shards": {reason: {"count", "examples": [EXAMPLE]}}}}}
    EXAMPLE: {"shard", "key", "detail"}

    Counts: `read` are good samples that were planned, `split` and `truncated` those of them that were too
    long, `samples`, `pieces`, `tokens` and `images` what was delivered (a sample counts with its first
    piece).
    """

    def __init__(self, sources: Mapping[str, Any] | None = None):
        """`sources`: a snapshot to go on from."""
        self.sources: dict[str, dict[str, Any]] = _copied(sources or {})

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """The counts as they are now, whatever is counted later."""
        return _copied(self.sources)

    def count(self, source: str, what: str, more: int = 1) -> None:
        """Add `more` to a source's count of that name."""
        counts = self.of(source)["counts"]
        counts[what] = counts.get(what, 0) + more

    def reject(self, reject: Reject) -> None:
        """Count a reject under its source, kind and reason."""
        example = {"shard": reject.shard, "key": reject.key, "detail": reject.detail}
        self._add_rejects(reject.source, reject.kind, reject.reason, 1, [example])

    def add(self, other: "Tally") -> None:
        """Count all that another has counted."""
        for source, theirs in other.sources.items():
            for what, count in theirs["counts"].items():
                self.count(source, what, count)
            for kind, reasons in theirs["rejected"].items():
                for reason, entry in reasons.items():
                    self._add_rejects(source, kind, reason, entry["count"], entry["examples"])

    def _add_rejects(
        self, source: str, kind: str, reason: str, count: int, examples: list[dict[str, str]]
    ) -> None:
        reasons = self.of(source)["rejected"].setdefault(kind, {})
        entry = reasons.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += count
        entry["examples"] = (entry["examples"] + examples)[:EXAMPLES]

    def bad_samples(self, source: str) -> dict[str, dict[str, Any]]:
        """Rejected samples by reason, without good ones that are too long or left out on purpose."""
        rejected = self.of(source)["rejected"].get("samples", {})
        return {reason: entry for reason, entry in rejected.items() if reason not in ("too_long", "excluded")}

    def of(self, source: str) -> dict[str, Any]:
        """What is counted of one source."""
        return self.sources.setdefault(source, {"counts": {}, "rejected": {}})


def _copied(sources: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A copy that counting further changes nothing of."""
    return {
        source: {
            "counts": dict(entry["counts"]),
            "rejected": {
                kind: {reason: dict(found) for reason, found in reasons.items()}
                for kind, reasons in entry["rejected"].items()
            },
        }
        for source, entry in sources.items()
    }


def check_bad_fraction(tally: Tally, allowed: float) -> None:
    """Raises DataError for a source with a larger share of bad samples, from JUDGED_FROM read on."""
    for source, entry in tally.sources.items():
        kinds = tally.bad_samples(source)
        bad = sum(entry["count"] for entry in kinds.values())
        read = bad + entry["counts"].get("read", 0)
        if allowed < 1 and read >= JUDGED_FROM and bad > allowed * read:
            worst = max(kinds, key=lambda reason: kinds[reason]["count"])
            one = kinds[worst]["examples"][0]
            raise DataError(
                f"source {source}: {bad} of {read} samples are bad ({bad / read:.1%}), more than "
                f"data.max_bad_fraction = {allowed}; most of them: {meaning(worst)}, as shard "
                f"{one['shard']}, sample {one['key']} ({one['detail']}). See data_report.json and rejects/"
            )


def rejected_line(sources: Mapping[str, Any]) -> str:
    """One line for people on what was rejected; empty where nothing was. `sources`: as in Tally.

    rejected: captions 12 of 2,400 samples (image_undecodable 10, caption_missing 2), 3 images (image_fetch 3)
    """
    found = filter(None, (_rejected_of(source, entry) for source, entry in sorted(sources.items())))
    line = "; ".join(found)
    return f"rejected: {line}; see rejects/" if line else ""


def _rejected_of(source: str, entry: Mapping[str, Any]) -> str:
    parts = []
    for kind, reasons in sorted(entry["rejected"].items(), key=lambda item: KINDS.index(item[0])):
        counts = Counter({reason: found["count"] for reason, found in reasons.items()})
        bad = counts.total()
        read = bad + entry["counts"].get("read", 0)
        of = (
            f"{bad:,} of {read:,} samples"
            if kind == "samples"
            else f"{bad:,} {kind if bad > 1 else kind[:-1]}"
        )
        parts.append(f"{of} ({', '.join(f'{reason} {count:,}' for reason, count in counts.most_common())})")
    return f"{source} {', '.join(parts)}" if parts else ""


def tally_of(state: SlotState) -> Tally:
    """Everything that a slot's state has counted, at planning and at delivery."""
    tally = Tally(state["plan"]["tally"])
    tally.add(Tally(state["delivered"]))
    return tally


def report(states: Iterable[SlotState]) -> dict[str, Any]:
    """{"sources": {source: as in Tally, and "epochs": how often it was delivered}}; those of ranks add up."""
    total, epochs = Tally(), Counter[str]()
    for state in states:
        total.add(tally_of(state))
        epochs.update(state["epochs"])
    return {"sources": {name: total.of(name) | {"epochs": times} for name, times in epochs.items()}}
