"""Fetch the weights and the tokenizer of a model from the Hugging Face hub.

    torchtitan-vlm download Qwen/Qwen3-0.6B
    torchtitan-vlm download siglip2-base-patch16-naflex --what weights --out weights/siglip2

Stopped, the same command goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.vlm.model_config import parts_in
from torchtitan.config.errors import ConfigError
from torchtitan.config.parse import run_tyro
from torchtitan.tools.hub import TOKENIZERS, What, download, repository

PROG = "torchtitan-vlm download"


@dataclass
class Options:
    """Which model, which of its files, and where they go."""

    name: tyro.conf.Positional[str]  # OWNER/NAME on the hub; NAME of a Llama, Mistral, Qwen or SigLIP
    what: What = "all"  # which files
    out: str = ""  # folder; without: assets/NAME
    # of your account, for gated and private ones; without: HF_TOKEN, or that of `hf auth login`
    token: str = ""
    revision: str = "main"  # branch, tag or commit


def main(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    options = run_tyro(Options, argv, None, PROG, __doc__)
    repo = repository(options.name)
    folder = Path(options.out or f"assets/{repo.rpartition('/')[2]}")
    found = download(repo, options.what, folder, options.token, options.revision)
    for path in found:
        print(f"{path.stat().st_size / 2**20:10.1f} MiB  {path}")
    if options.what != "tokenizer" and (option := option_for(folder)):
        print(f"start from its weights: --checkpoint.initial_load_in_hf {option} {folder}")
    if any((folder / name).is_file() for name in TOKENIZERS):
        print(f"use its tokenizer: --model.tokenizer_path {folder}")
    return 0


def option_for(folder: Path) -> str:
    """The option that takes the weights of a folder; empty where no model of ours has such."""
    try:
        parts = parts_in(folder)
    except ConfigError:
        return ""
    part = f"{parts[0]}_" if len(parts) == 1 else ""
    return f"--checkpoint.initial_load_{part}path"
