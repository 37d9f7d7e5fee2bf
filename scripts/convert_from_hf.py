"""Make a checkpoint of Hugging Face folders.

The command `torchtitan-vlm from_hf` of a checkout: --help lists its options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.commands import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["from_hf", *sys.argv[1:]]))
