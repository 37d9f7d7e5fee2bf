"""Download a tokenizer or weights from the Hugging Face hub.

    torchtitan-vlm download --repo meta-llama/Llama-3.2-1B
    torchtitan-vlm download --repo google/siglip2-so400m-patch16-naflex --what weights --out weights/siglip2

Stopped, the same command goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from torchtitan.tools.hub import What, download

PROG = "torchtitan-vlm download"


@dataclass
class Options:
    """Which files of which repository are fetched, and where they go."""

    repo: str  # OWNER/NAME on the hub
    what: What = "tokenizer"  # which files
    out: str = ""  # folder; without: assets/NAME
    # of your account, for gated and private ones; without: HF_TOKEN, or that of `hf auth login`
    token: str = ""
    revision: str = "main"  # branch, tag or commit


def main(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    options = tyro.cli(Options, args=argv, prog=PROG, description=__doc__, use_underscores=True)
    folder = Path(options.out or f"assets/{options.repo.rpartition('/')[2]}")
    found = download(options.repo, options.what, folder, options.token, options.revision)
    for path in found:
        print(f"{path.stat().st_size / 2**20:10.1f} MiB  {path}")
    if options.what != "weights":
        print(f"use it: --model.tokenizer_path {folder}")
    return 0
