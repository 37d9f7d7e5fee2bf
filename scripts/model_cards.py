"""Write the page of model cards: sizes, parameters and bytes of every flavor.

python scripts/model_cards.py --out docs/models.md
"""

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from experiments.vlm.model.cards import page  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs/models.md", help="file to write")
    out = parser.parse_args().out
    out.write_text(page(), encoding="utf-8")
    print(f"{out} has {len(page().splitlines())} lines")


if __name__ == "__main__":
    main()
