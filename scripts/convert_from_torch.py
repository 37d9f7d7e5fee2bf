"""Make a Hugging Face folder of files of torch.save, those of Megatron too.

The command `torchtitan-vlm from_torch` of a checkout: --help lists its options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.commands import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["from_torch", *sys.argv[1:]]))
