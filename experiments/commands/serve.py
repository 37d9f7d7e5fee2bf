"""A page to talk to a model, and OpenAI's chat completions for programs.

    torchtitan-vlm serve --hf FOLDER
    torchtitan-vlm serve --job.dump_folder outputs/run --port 8080

Drop pictures on the page, and see the patches that they become. `POST /v1/chat/completions` takes images as
data URLs; answers stream where "stream" is true. Reachable from this machine alone, unless --host says
otherwise: it asks for no password.
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.commands.model_options import ModelOptions, model_job, open_model
from torchtitan.config.check import check_options
from torchtitan.config.errors import UserError, require
from torchtitan.tools.logging import init_logger, logger


@dataclass
class Options(ModelOptions):
    """Where it listens, and what a request may cost."""

    host: str = "127.0.0.1"  # 0.0.0.0: any other machine too
    port: int = 8000  # 0: any that is free
    sequences: int = 4  # answered at one time
    max_tokens: int = 512  # of an answer
    max_body_mb: int = 24  # of a request


def main(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    init_logger()
    options, job = model_job(argv, Options, __doc__)
    check_options(options, dict.fromkeys(("sequences", "max_tokens", "max_body_mb"), ">= 1"))
    require(0 <= options.port < 1 << 16, f"--port = {options.port}: must be from 0 to 65535")
    # Only now, since they import torch.
    from experiments.vlm.generate.prompt import ONE_TURN
    from experiments.vlm.generate.server import RequestLimits, Server, family_of
    from experiments.vlm.generate.service import Service
    from torchtitan.distributed.process_group import close_process_group, world_size

    require(world_size() == 1, "serve runs in one process: give it one GPU, or use generate with several")
    address = options.host, options.port
    try:
        socket.create_server(address, family=family_of(options.host)).close()  # before the model is read
    except OSError as error:
        raise UserError(f"--host {options.host} --port {options.port}: {error.strerror}") from None
    answering = open_model(options, job, options.sequences, options.max_tokens, reuse=True)
    limits = RequestLimits(options.max_body_mb << 20, options.max_tokens)
    name = Path(options.hf or job.job.dump_folder).resolve().name
    server = Server(address, Service(answering), name, limits)
    if answering.prompter.template is None:
        logger.info(f"{ONE_TURN}: the page asks each turn alone, and requests of several are refused")
    host = f"[{options.host}]" if ":" in options.host else options.host
    logger.info(f"{name} at http://{host}:{server.server_port}")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        logger.info("stopped")
    finally:
        close_process_group()
    return 0
