"""Names that count up."""

import re
from pathlib import Path


def next_number(folder: Path) -> int:
    """One more than the largest number that a name in `folder` begins with; 1 where there is none."""
    numbers = [int(match[0]) for path in folder.glob("*") if (match := re.match(r"\d+", path.name))]
    return max(numbers, default=0) + 1
