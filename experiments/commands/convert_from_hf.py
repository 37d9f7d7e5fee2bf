"""Make a checkpoint of Hugging Face folders, which checkpoint.initial_load_path takes.

    torchtitan-vlm from_hf --hf assets/my-vlm --out checkpoints/my-vlm
    torchtitan-vlm from_hf --encoder assets/siglip2-base --decoder assets/Qwen3-0.6B --out checkpoints/start

The second makes a fresh projector. A run reads folders by itself too (checkpoint.initial_load_in_hf). Weights
keep the dtypes of their files. `--list` says what can be read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.commands.job_options import parse_command
from experiments.vlm.model.families import FAMILIES as WHOLES
from experiments.vlm.model.towers import INSIDE, TOWERS
from torchtitan.components.tokenizer import load_tokenizer
from torchtitan.config.errors import require
from torchtitan.models.decoder.hf_config import FAMILIES
from torchtitan.tools.disk import new_folder, whole_folder
from torchtitan.tools.hub import get_it
from torchtitan.tools.logging import init_logger

READ = f"""model_type of config.json:
  {", ".join(WHOLES)}: a whole model
  {", ".join((*TOWERS, *INSIDE))}: an encoder
  {", ".join(FAMILIES)}: a decoder
weights: *.safetensors, with an index or without"""


@dataclass
class Options:
    """Which folders, and where to."""

    hf: str = ""  # a folder of the whole model, or of a part
    encoder: str = ""  # a folder for the encoder, in place of what --hf holds
    decoder: str = ""  # the same for the decoder
    # enlarge the vocabulary to that of this tokenizer; the new rows start as the mean of the others
    tokenizer: str = ""
    out: str = ""  # a folder that is not there yet
    list: bool = False  # say what can be read, and read nothing


def main(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    init_logger()
    options, job = parse_command(argv, Options, __doc__)
    if options.list:
        print(READ)
        return 0
    c = job.checkpoint
    c.enable, c.initial_load_in_hf = False, True
    c.initial_load_path, c.initial_load_encoder_path = options.hf, options.encoder
    c.initial_load_decoder_path = options.decoder
    named = options.hf or options.encoder or options.decoder
    require(bool(named), "--hf is missing: which folder is to be read?")
    out = new_folder(options.out)
    for name in ("hf", "encoder", "decoder"):
        folder = getattr(options, name)
        missing = f"--{name} = {folder}: no such folder (looked from {Path.cwd()})"
        require(not folder or Path(folder).is_dir(), f"{missing}; {get_it(Path(folder))}")
    with whole_folder(out) as half:
        from experiments.vlm.weights.initial_weights import as_checkpoint

        tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
        for line in as_checkpoint(job, tokenizer, half):
            print(line)
    print(f"train from it: --checkpoint.initial_load_path {out}")
    return 0
