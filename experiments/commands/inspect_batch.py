"""Show packed batches as the model gets them.

    torchtitan-vlm inspect --job.config_file vlm_debug --out report.html
    torchtitan-vlm inspect --job.config_file vlm_debug --steps 100 --keys keys.jsonl

The page (or, with a name that ends so, the PNG) shows the first slots: the sequence, the row of patches, the
images put together again from the tensor, which visual token lands where, and the text. The keys are all that
was delivered: a line for each sample and, with a hash of its tensors, for each slot. No model is built.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.commands.job_options import parse_command
from experiments.vlm.check import check_output, check_sources
from experiments.vlm.view.inspection import inspect
from torchtitan.components.tokenizer import load_tokenizer
from torchtitan.config.errors import require
from torchtitan.config.layout import resolve_batch
from torchtitan.tools.logging import init_logger


@dataclass
class Options:
    """How many batches are read, and what is written down of them."""

    out: str = ""  # the report: a name that ends in .html or .png
    keys: str = ""  # a JSON line for each delivered sample, and for each slot a hash of its tensors
    dump: str = ""  # a folder for data_report.json and rejects/ of what was read; empty: they are not kept
    steps: int = 1  # optimizer steps to read
    slots: int = 4  # slots to show in the report, the first ones
    # processes of the run whose batches these are; counts where training.global_batch_size is -1
    world_size: int = 1


def main(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    init_logger()
    options, job = parse_command(argv, Options, __doc__)
    require(
        bool(options.out or options.keys),
        "nothing to write: give --out REPORT.html (or .png), or --keys KEYS.jsonl",
    )
    known = not options.out or Path(options.out).suffix in (".html", ".png")
    require(known, f"--out = {options.out}: its name must end in .html or .png")
    check_output(options.out, "--out")
    check_output(options.keys, "--keys")
    check_sources(job)
    job.training.global_batch_size = resolve_batch(job, options.world_size).global_
    job.job.dump_folder = options.dump  # looking at the data leaves no trace in the folder of the run itself
    seen = inspect(
        job, load_tokenizer(job.model.tokenizer_path), options.steps, options.slots, options.out, options.keys
    )
    print(seen)
    for name, path in (
        ("report", options.out),
        ("keys", options.keys),
        ("data_report.json and rejects", options.dump),
    ):
        if path:
            print(f"{name}: {path}")
    return 0
