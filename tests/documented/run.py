"""A block of a page in bash, with the warm Python; and a page's blocks, one after the other."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.documented.pages import Block, blocks, spans
from tests.documented.warm_python import Server

OURS = ("VENV", "NGPU", "CONFIG_FILE", "DRY_RUN", "NNODES", "NODE_RANK", "MASTER_ADDR", "WORLD_SIZE", "RANK")


def run(block: Block | str, python: Server, folder: Path) -> subprocess.CompletedProcess:
    """In `folder`. Options of its commands are all that is looked at where the block has a reason."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    environment |= {"PATH": f"{python.bin}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    code = block
    if isinstance(block, Block):
        code = block.code
        environment |= {"LOOK_ONLY": "1"} if block.reason else {}
    command = ["bash", "-euo", "pipefail", "-c", str(code)]
    return subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run_page(page: Path, prepared: Path, python: Server, folder: Path) -> None:
    """In a copy of its own of `prepared`."""
    shutil.copytree(prepared, folder, symlinks=True)
    for block in [*blocks(page), *spans(page)]:
        done = run(block, python, folder)
        assert done.returncode == 0, f"{page.name}:{block.line}\n{block.code}\n{done.stdout[-3000:]}"
