"""Which S, L, rows and buffer waste least on a job's data? Decodes nothing, simulates the packer.

The command `torchtitan-vlm advise` of a checkout: --help lists its options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.commands import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["advise", *sys.argv[1:]]))
