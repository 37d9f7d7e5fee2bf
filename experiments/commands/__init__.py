"""`torchtitan-vlm COMMAND`: what people run, a file a command. In a checkout: python -m experiments.commands.

Each has `main(argv) -> exit code`, imported when it is asked for. What the user can mend is reported here, in
a line.
"""

import importlib
import sys
from collections.abc import Sequence

from torchtitan import __version__
from torchtitan.config.errors import UserError, did_you_mean
from torchtitan.tools.error_line import INTERRUPTED, UNREAD, nobody_reads, report_line, reported
from torchtitan.tools.signals import Ended, unwinding

COMMANDS = {  # name: (module of this package, what it does)
    "train": ("train", "train a model on one process or many, one machine or many"),
    "sweep": ("sweep", "train a job many times, each with other options"),
    "compare": ("compare_runs", "compare runs: options that differ, and all curves"),
    "inspect": ("inspect_batch", "show packed batches as the model gets them"),
    "advise": ("advise_packing", "which S, L, rows and buffer waste least on a job's data"),
    "tune": ("tune", "which slots, L, chunk and recomputation train a job fastest here"),
    "estimate": ("estimate_memory", "what a job needs on each rank, and which layouts fit"),
    "generate": ("generate", "answer a prompt with images, or a file of them"),
    "evaluate": ("evaluate", "how good a model is at captions, questions, choices and held-out documents"),
    "chat": ("chat", "talk to a model in the terminal"),
    "serve": ("serve", "a page to talk to a model, and OpenAI's chat completions"),
    "download": ("download_hf_assets", "fetch weights and tokenizer of a model from the Hugging Face hub"),
    "to_hf": ("convert_to_hf", "write a checkpoint as a folder that transformers opens"),
    "from_hf": ("convert_from_hf", "make a checkpoint of Hugging Face folders"),
    "from_torch": ("convert_from_torch", "make a Hugging Face folder of Megatron's files, or of pickles"),
    "prepare": ("prepare_data", "make shards, with the images inside, from records that name their images"),
}
USAGE = "\n".join(
    [
        "usage: torchtitan-vlm COMMAND [--option value ...]    torchtitan-vlm COMMAND --help    --version\n",
        *(f"  {name:10s} {purpose}" for name, (_, purpose) in COMMANDS.items()),
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (without: that of this process) names. Returns its exit code."""
    name, *options = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if argv is None:
        sys.argv[0] = f"torchtitan-vlm {name}"  # what a command's own --help calls it
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name == "--version":
        print(f"torchtitan-vlm {__version__}")
        return 0
    try:
        if name not in COMMANDS:
            raise UserError(f"{name}: no such command{did_you_mean(name, COMMANDS)}")
        with unwinding():
            return importlib.import_module(f"{__name__}.{COMMANDS[name][0]}").main(options)
    except Ended as ended:
        report_line(str(ended))
        return ended.code
    except KeyboardInterrupt:
        report_line("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        if not nobody_reads():
            raise
        return UNREAD
    except (UserError, OSError) as error:
        return reported(error)
