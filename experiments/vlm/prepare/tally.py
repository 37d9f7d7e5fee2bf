"""What became of every record and every image of the input: counts by reason, examples, and a line for each that was rejected.

In a report, records["read"] is records["written"] and all of records["rejected"] together, and so for images.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

EXAMPLES = 5  # of each reason
WHATS = ("records", "images")


@dataclass
class Tally:
    read: Counter = field(default_factory=Counter)  # records, images
    written: Counter = field(default_factory=Counter)
    rejected: dict[str, Counter] = field(default_factory=lambda: {what: Counter() for what in WHATS})
    lines: list[dict] = field(default_factory=list)
    bytes: int = 0

    def keep(self, what: str, size: int = 0) -> None:
        self.read[what] += 1
        self.written[what] += 1
        self.bytes += size

    def reject(self, what: str, key: str, reason: str, detail: str, name: str = "") -> None:
        """`name`: the URL or path of an image."""
        self.read[what] += 1
        self.rejected[what][reason] += 1
        line = {"what": what.removesuffix("s"), "key": key, "reason": reason, "detail": detail}
        self.lines.append(line | ({"image": name} if name else {}))

    def report(self) -> dict:
        return {
            **{
                what: {"read": self.read[what], "written": self.written[what], "rejected": dict(sorted(self.rejected[what].items()))}
                for what in WHATS
            },
            "bytes": self.bytes,
            "examples": first_of_each(self.lines),
        }


def first_of_each(lines: Iterable[dict]) -> list[dict]:
    seen: Counter = Counter()
    kept = []
    for line in lines:
        kind = line["what"], line["reason"]
        seen[kind] += 1
        if seen[kind] <= EXAMPLES:
            kept.append(line)
    return kept


def add_reports(reports: Iterable[dict]) -> dict:
    """One report of many, in their order."""
    total = Tally()
    examples: list[dict] = []
    for report in reports:
        for what in WHATS:
            total.read[what] += report[what]["read"]
            total.written[what] += report[what]["written"]
            total.rejected[what].update(report[what]["rejected"])
        total.bytes += report["bytes"]
        examples = first_of_each(examples + report["examples"])
    return total.report() | {"examples": examples}
