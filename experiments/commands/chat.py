"""Talk to a model in the terminal.

    torchtitan-vlm chat --hf FOLDER
    torchtitan-vlm chat --job.dump_folder outputs/run --temperature 0.7

A line is what the user says; /image PATH adds a picture to it, /undo takes the last turn back, /save PATH
keeps the conversation, /help lists the rest. What was read stays in memory between turns.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.commands.model_options import (
    AnswerOptions,
    ModelOptions,
    any_terminal,
    model_job,
    open_model,
)
from torchtitan.config.check import check_options
from torchtitan.config.errors import UserError, require
from torchtitan.tools.logging import init_logger


@dataclass
class Options(ModelOptions, AnswerOptions):
    """Which model, and how it answers."""


def main(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    init_logger(sys.stderr)
    any_terminal()
    options, job = model_job(argv, Options, __doc__)
    check_options(options, {"max_tokens": ">= 1"})
    # Only now, since they import torch.
    from experiments.vlm.generate.chat import HELP, Chat
    from experiments.vlm.generate.prompt import ONE_TURN
    from torchtitan.distributed.process_group import close_process_group, world_size

    require(world_size() == 1, "chat runs in one process")
    answering = open_model(options, job, 1, options.max_tokens, reuse=True)
    print(HELP, file=sys.stderr)
    if answering.prompter.template is None:
        print(f"{ONE_TURN}: each turn is asked alone, with its own pictures", file=sys.stderr)
    try:
        converse(Chat(answering, options.ask))
    finally:
        close_process_group()
    return 0


def converse(chat: Any) -> None:
    """Lines of standard input to answers on standard output, until it ends."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
            if not line or line.strip() == "/quit":
                return
            line = line.strip()
            if line.startswith("/"):
                print(chat.command(line), file=sys.stderr)
            elif line or chat.pictures:
                for piece in chat.say(line):
                    print(piece, end="", flush=True)
                print(flush=True)
        except KeyboardInterrupt:  # meant for an answer that has just ended, or not yet begun
            print("\n/quit or Ctrl-D leaves", file=sys.stderr)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
