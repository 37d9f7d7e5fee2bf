"""How good is a model at captions, questions, choices and held-out documents?

The command `torchtitan-vlm evaluate` of a checkout: --help lists its options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.commands import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
