"""Write a checkpoint as a folder that transformers opens: the whole model, or one of its towers.

    torchtitan-vlm to_hf --job.dump_folder outputs/vlm --checkpoint step-20000 --out vlm-hf --dtype bfloat16
    torchtitan-vlm to_hf --job.dump_folder outputs/vlm --checkpoint step-20000 --out siglip --part encoder

The job is that of the dump folder's config.toml, unless --job.config_file names one. Memory holds one tensor
at a time. `--list` says what can be written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.commands.job_options import parse_command
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.model.families import llava_original
from experiments.vlm.model.towers import TOWERS
from experiments.vlm.model_config import model_config
from experiments.vlm.saved_model import use_checkpoint, with_saved
from torchtitan.config.check import check_options
from torchtitan.config.errors import require
from torchtitan.models.decoder.hf_config import FAMILIES
from torchtitan.tools.disk import new_folder, whole_folder
from torchtitan.tools.logging import init_logger

WRITTEN = f"""all       Lfm2VlForConditionalGeneration, LlavaForConditionalGeneration (with --layout original
          LlavaLlamaForCausalLM), LlavaNext- and LlavaOnevision-, each with its processor
encoder   {", ".join(tower.architecture for tower in TOWERS.values())}, without pooling head
decoder   {", ".join(family.architecture for family in FAMILIES.values())}, with its tokenizer"""


@dataclass
class Options:
    """Which checkpoint, what of it, and where to."""

    checkpoint: str = ""  # step-N of the job's checkpoints, or the path of one; empty: the latest
    out: str = ""  # a folder that is not there yet
    part: Literal["all", "encoder", "decoder"] = "all"  # what is written
    # of LLaVA-1.5: as transformers has it, or as its authors save it, for their scripts
    layout: Literal["transformers", "original"] = "transformers"
    # with --layout original: the name of the tower in config.json; empty: as one of its size was published
    vision_tower: str = ""
    # of the weights; stored: as in the checkpoint, float32 after training
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    # of a checkpoint with [lora]: in the weights of the base, left out, or alone, as a folder for peft
    adapters: Literal["merge", "leave_out", "only"] = "merge"
    shard_gb: float = 5.0  # of a file, at most, where no tensor is larger
    list: bool = False  # say what can be written, and write nothing


def main(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    init_logger()
    options, job = parse_command(with_saved(argv), Options, __doc__)
    if options.list:
        print(WRITTEN)
        return 0
    check_options(options, {"shard_gb": "> 0"})
    out = new_folder(options.out)
    check_layout(options, out)
    checkpoint = use_checkpoint(job, options.checkpoint)
    with whole_folder(out) as half:
        write(job, checkpoint, half, options)
    alone = options.adapters == "only"
    print(f"{out}: {'adapters' if alone else options.part} of {checkpoint}")
    if options.layout == "original":
        return 0
    opened = f"PeftModel.from_pretrained(base, {str(out)!r})" if alone else None
    print(f"open it: {opened or f'{OPENED[options.part]}.from_pretrained({str(out)!r})'}")
    return 0


def check_layout(options: Options, out: Path) -> None:
    """Raises ConfigError where LLaVA's own layout cannot be what is asked for."""
    original = options.layout == "original"
    require(original or not options.vision_tower, "--vision_tower needs --layout original")
    whole = "--layout original: is of the whole model with adapters merged: leave --part and --adapters"
    require(not original or (options.part == "all" and options.adapters == "merge"), whole)
    named = f"--out = {out}: LLaVA's scripts take a folder for a LLaVA where its name has 'llava' in it"
    require(not original or "llava" in out.name.lower(), named)


LAYOUTS = {"transformers": "", "original": llava_original.MODEL_TYPE}
OPENED = {
    "all": "AutoModelForImageTextToText",
    "encoder": "AutoModel",
    "decoder": "AutoModelForCausalLM",
}


def write(job: VLMJobConfig, checkpoint: Path, folder: Path, options: Options) -> None:
    """Write and say how many tensors of what size they are."""
    import torch

    from experiments.vlm.weights.adapter import write_adapter
    from experiments.vlm.weights.export import export

    dtype = None if options.dtype == "stored" else getattr(torch, options.dtype)
    if options.adapters == "only":
        require(options.part == "all", f"--part {options.part}: adapters are written for the whole model")
        print(f"{len(write_adapter(checkpoint, folder, job.lora, model_config(job), dtype))} tensors")
        return
    made = export(
        job,
        checkpoint,
        folder,
        part=options.part,
        dtype=dtype,
        shard_gb=options.shard_gb,
        merge_adapters=options.adapters == "merge",
        layout=LAYOUTS[options.layout],
        vision_tower=options.vision_tower,
    )
    files, size = list(folder.glob("*.safetensors")), sum(tensor.size for tensor in made.tensors.values())
    print(f"{len(made.tensors)} tensors, {size:,} bytes in {len(files)} files")
