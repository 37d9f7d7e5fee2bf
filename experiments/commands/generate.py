"""Answer a prompt, or many.

    torchtitan-vlm generate --job.config_file vlm_sees --job.dump_folder outputs/vlm_sees --image a.jpg
    torchtitan-vlm generate --hf FOLDER --image a.jpg --image b.png --prompt "What differs?"
    torchtitan-vlm generate --hf FOLDER --input questions.jsonl --out answers.jsonl

The answer alone goes to standard output, as it comes; all else to standard error. Without --hf it is the
latest checkpoint of job.dump_folder that answers, and its config.toml says how where no --job.config_file is
given. A line of --input is {"prompt": "...", "images": ["a.jpg"]} or {"messages": [...]}, with an "id" where
its number will not do; of --out {"id", "text", "ended", "logprob"} or {"id", "error"}. What is in --out
already is not asked again.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.commands.model_options import (
    AnswerOptions,
    ModelOptions,
    any_terminal,
    model_job,
    open_model,
)
from experiments.vlm.check import check_output
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.saved_model import read_with, use_checkpoint
from torchtitan.components.saved_config import differences
from torchtitan.config.check import check_options
from torchtitan.config.errors import require
from torchtitan.tools.disk import write_whole
from torchtitan.tools.lock import locked
from torchtitan.tools.logging import init_logger
from torchtitan.tools.signals import resumable


@dataclass
class Options(ModelOptions, AnswerOptions):
    """What is asked."""

    # after the images, or with them where it says <image>; with a chat template it is what the user says
    prompt: str = ""
    # a file; may be given several times
    image: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    input: str = ""  # a JSONL file of prompts
    out: str = ""  # a JSONL file of answers
    samples: int = 1  # answers to each prompt of --input, of different draws
    sequences: int = 8  # answered at one time


def main(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    init_logger(sys.stderr)
    any_terminal()
    options, job = model_job(argv, Options, __doc__)
    check(options)
    if not options.input:
        answer_prompt(options, job)
        return 0
    busy = f"--out {options.out}: somebody is writing answers there; wait for it, or give another file"
    with locked(Path(options.out), busy), resumable():
        if not options.hf:  # the latest may be another when the command is given again
            options.checkpoint = str(use_checkpoint(job, options.checkpoint))
        require_same_options(options, job)
        answer_records(options, job)
    return 0


def answer_prompt(options: Options, job: VLMJobConfig) -> None:
    """Answer one prompt, to standard output. Raises UserError. Imports torch, as the next does."""
    from experiments.vlm.generate.answer_file import answer_one
    from experiments.vlm.generate.prompt import read_picture
    from experiments.vlm.generate.record import content_of
    from torchtitan.distributed.process_group import close_process_group

    content = content_of(options.prompt, [read_picture(path, "--image") for path in options.image])
    answering = open_model(options, job, 1, options.max_tokens)
    try:
        answer_one(answering, content, options.ask)
    finally:
        close_process_group()


def answer_records(options: Options, job: VLMJobConfig) -> None:
    """Answer the prompts of --input, to --out. Raises UserError."""
    import torch.distributed as dist

    from experiments.vlm.data.formats.record_shard import ImageValues, folder_of
    from experiments.vlm.generate.answer_file import AnswerFile, answer_file
    from torchtitan.distributed.process_group import close_process_group

    answering = open_model(options, job, options.sequences, options.max_tokens)
    try:
        keep_options(options, job, dist.get_rank() == 0)
        out = AnswerFile(Path(options.out), answering.mesh.leads, options.samples)
        images = ImageValues(folder_of(options.input), job.data)
        answer_file(answering, Path(options.input), out, images, options.ask)
    finally:
        close_process_group()


def asked_with(options: Options, job: VLMJobConfig) -> dict[str, Any]:
    """What decides the answers in a file, but for its questions."""
    free = ("prompt", "image", "input", "out", "sequences")
    own = {name: value for name, value in vars(options).items() if name not in free}
    return own | {"run": job.job.dump_folder} | read_with(job)


def keep_options(options: Options, job: VLMJobConfig, writes: bool) -> None:
    """Write the options next to --out, for a command that goes on with it."""
    if writes:
        write_whole(options_file(options), json.dumps(asked_with(options, job)))


def options_file(options: Options) -> Path:
    """Where `keep_options` writes."""
    return Path(options.out + ".options.json")


def require_same_options(options: Options, job: VLMJobConfig) -> None:
    """Raises UserError where the answers in --out were drawn with other options than the rest would be."""
    if not (Path(options.out).is_file() and options_file(options).is_file()):
        return
    others = differences(json.loads(options_file(options).read_text()), asked_with(options, job))
    listed = ", ".join(map(str, others))
    require(not others, f"--out {options.out} has answers to other options: {listed}; give another file")


def check(options: Options) -> None:
    """Raises UserError before torch is imported."""
    asked = bool(options.prompt or options.image)
    require(asked or bool(options.input), "nothing to answer: give --prompt, --image or --input")
    require(not (asked and options.input), "--input asks by itself: leave out --prompt and --image")
    require(bool(options.input) == bool(options.out), "--input and --out: give both")
    require(options.samples == 1 or bool(options.input), "--samples needs --input and --out")
    require(all(options.stop), "--stop: an empty text ends nothing; leave it out")
    check_options(options, dict.fromkeys(("samples", "sequences", "max_tokens"), ">= 1"))
    for path in options.image:
        require(Path(path).is_file(), f"--image {path}: no such file (looked from {Path.cwd()})")
    if options.input:
        require(Path(options.input).is_file(), f"--input {options.input}: no such file")
        check_output(options.out, "--out")
        same = Path(options.out).exists() and Path(options.out).samefile(options.input)
        require(not same, f"--out {options.out}: is the file of --input; name another")
