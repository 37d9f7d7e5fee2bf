"""Which model answers, and how: what generate, chat, serve, evaluate and lmms-eval have in common."""

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from experiments.__main__ import load_spec
from experiments.commands.job_options import parse_command
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.processor import folder_template, spoken_template
from experiments.vlm.saved_model import use_checkpoint, use_hf_folder, with_saved
from torchtitan.config.errors import require
from torchtitan.generation.options import Sampling


@dataclass
class ModelOptions:
    """Which model answers."""

    checkpoint: str = ""  # step-N of the job's checkpoints, or the path of one; empty: the latest
    hf: str = ""  # a Hugging Face folder in place of a checkpoint
    # chatml, llama3, vicuna_v1, plain or a Jinja file; none: no conversations; empty: that of --hf, or of the
    # job's data
    chat_template: str = ""


@dataclass
class AnswerOptions(Sampling):
    """How an answer is drawn, and where it ends."""

    seed: int = 0  # of the draws
    max_tokens: int = 256  # of an answer
    # ends an answer, and is not part of it; may be given several times
    stop: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)

    def ask(self, number: int, prompt: Any) -> Any:
        """The engine's Request of this prompt. Imports torch."""
        from torchtitan.generation.engine import Request

        return Request(number, prompt, self, self.seed, self.max_tokens, tuple(self.stop))


def any_terminal() -> None:
    """Let no character that the encoding of standard input or output lacks end the command."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


Chosen = TypeVar("Chosen", bound=ModelOptions)


def model_job(
    argv: Sequence[str], options_class: type[Chosen], about: str | None
) -> tuple[Chosen, VLMJobConfig]:
    """A command's options and the job of the model that answers. Raises ConfigError."""
    options, job = parse_command(with_saved(argv), options_class, about)
    if options.hf:
        require(not options.checkpoint, "--hf and --checkpoint: give one of them")
        use_hf_folder(job, options.hf, argv)
    return options, job


def chosen_template(options: ModelOptions, job: VLMJobConfig) -> str:
    """What load_chat_template takes; empty: the model knows no conversations."""
    if options.chat_template:
        return "" if options.chat_template == "none" else options.chat_template
    return folder_template(Path(options.hf)) if options.hf else spoken_template(job)


def open_model(
    options: ModelOptions, job: VLMJobConfig, sequences: int, most_tokens: int, reuse: bool = False
) -> Any:
    """The model that answers, with a cache for so many sequences of a prompt of the job's length and an
    answer of `most_tokens`: see open_answering. With a checkpoint its model is from then on the job's.

    Raises UserError. Imports torch.
    """
    from experiments.vlm.generate.answering import open_answering

    checkpoint = None if options.hf else use_checkpoint(job, options.checkpoint)
    places = job.training.seq_len + most_tokens
    spec, template = load_spec(job.model.name), chosen_template(options, job)
    return open_answering(job, spec, checkpoint, template, sequences, places, reuse=reuse)
