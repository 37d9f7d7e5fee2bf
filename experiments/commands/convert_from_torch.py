"""Make a Hugging Face folder of files of torch.save, which runs and other commands do not open.

    torchtitan-vlm from_torch --torch mistral_clip_tp4 --out assets/mistral-clip
    torchtitan-vlm from_torch --torch assets/vicuna-7b-v1.5 --out assets/vicuna-7b

The first is what Megatron trains, CLIP, a projector and Mistral or one of the towers alone, at any tensor
parallel degree. The second has *.bin and other files, which come along as they are. Files are opened with
weights_only: one that holds more than tensors is refused, since it could run code.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.commands.job_options import parse_command
from torchtitan.config.check import check_options
from torchtitan.config.errors import require
from torchtitan.tools.disk import new_folder, whole_folder, write_json
from torchtitan.tools.logging import init_logger


@dataclass
class Options:
    """Which folder, and where to."""

    torch: str = ""  # Megatron's folder (of iter_..., or of mp_rank_...), or one with a config.json and *.bin
    out: str = ""  # a folder that is not there yet
    encoder_head_dim: int = 64  # of Megatron's CLIP: width of a head, which no shape says
    decoder_head_dim: int = 128  # of Megatron's Mistral: the same
    rope_theta: float = 1e6  # of Megatron's Mistral: its --rotary-base
    shard_gb: float = 5.0  # of a file, at most, where no tensor is larger


def main(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    init_logger()
    options, _ = parse_command(argv, Options, __doc__)
    require(bool(options.torch), "--torch is missing: which folder is to be read?")
    above = ("encoder_head_dim", "decoder_head_dim", "rope_theta", "shard_gb")
    check_options(options, dict.fromkeys(above, "> 0"))
    source, out = Path(options.torch).expanduser(), new_folder(options.out)
    require(source.is_dir(), f"--torch = {source}: no such folder (looked from {Path.cwd()})")
    with whole_folder(out) as half:
        print(write(source, half, options))
    print(f"train from it: --checkpoint.initial_load_in_hf --checkpoint.initial_load_path {out}")
    return 0


def write(source: Path, folder: Path, options: Options) -> str:
    """Returns what was read."""
    from experiments.vlm.weights import megatron
    from torchtitan.models.hf.config_file import CONFIG
    from torchtitan.models.hf.torch_files import read_pickles
    from torchtitan.models.hf.writing import write_folder

    if any(source.glob("mp_rank_*")) or any(source.glob("iter_*/mp_rank_*")):
        heads = megatron.Heads(options.encoder_head_dim, options.decoder_head_dim)
        read = megatron.read(source, heads, options.rope_theta)
        tensors, held = read.tensors, f"{', '.join(read.parts)} of Megatron"
        write_json(folder / CONFIG, read.config)
    else:
        tensors, others = read_pickles(source)
        held = f"{len(others)} other files"
        for path in others:
            shutil.copy(path, folder / path.name)
    write_folder(tensors, folder, options.shard_gb)
    return f"{source}: {len(tensors)} tensors, {held}"
