"""Say what a job needs on each rank, without a GPU: peak memory, FLOPs, bytes sent, and which layouts fit.

The command `torchtitan-vlm estimate` of a checkout: --help lists its options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.commands import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["estimate", *sys.argv[1:]]))
