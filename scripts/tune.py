"""Find the slots, L, chunk and recomputation that train a job fastest on this machine, by short runs of it.

The command `torchtitan-vlm tune` of a checkout: --help lists its options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.commands import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
