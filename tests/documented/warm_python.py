"""A Python that has imported torch already: each program that is started with it is a fork of one process.

`Server` starts that process and writes `python` and `torchtitan-vlm` into a folder, to be the first of PATH.
They are small clients: they hand over arguments, environment, working directory and standard streams, and end
as their program ends. What shell scripts, launchers, multiprocessing and `os.execv(sys.executable, ...)`
start is warm too.

A program that is started with LOOK_ONLY in its environment ends where its options are found to be good.
"""

import atexit
import gc
import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from multiprocessing import util
from pathlib import Path

from tests.documented import look_only
from tests.documented.look_only import FOREIGN

REPOSITORY = Path(__file__).parents[2]
IMPORTED = ("torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.optim", "experiments.vlm.spec",
            "matplotlib.figure", "torchtitan.train", "pyarrow.parquet", "tensorboard", "typeguard",
            "torchtitan.sweep.run", "tests.frozen_heap")  # fmt: skip
# Options that make a program end soon; they win, since they come last.
SHORTER = {
    "experiments": [
        *("--training.steps", "2", "--validation.steps", "1"),
        *("--metrics.no_enable_tensorboard", "--metrics.no_save_plot"),
    ],
    "advise": ["--samples", "200", "--seconds", "5"],
    "tune": ["--minutes", "0.5", "--job.dry_run"],
    "advise_packing": ["--samples", "200", "--seconds", "5"],
}
PROGRAMS: dict[str, list[str]] = {
    "python": [],
    "python3": [],
    "python3.11": [],
    "torchtitan-vlm": ["-m", "experiments.commands"],
    **{name: ["-m", "tests.documented.look_only", name] for name in ("pip", *FOREIGN)},
}
CLIENT = """#!{python} -IS
import os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
argv = {before!r} + sys.argv[1:]
text = "\\0".join([str(len(argv)), *argv, os.getcwd(), *(f"{{k}}={{v}}" for k, v in os.environ.items())])
data = text.encode(errors="surrogateescape")
socket.send_fds(server, [len(data).to_bytes(8, "little")], [0, 1, 2])
server.sendall(data)
code = server.recv(1)
os._exit(code[0] if code else 1)
"""


class Server:
    """The process, from start to `close`."""

    def __init__(self, folder: Path):
        self.bin, address = folder / "bin", str(folder / "socket")
        self.bin.mkdir(parents=True)
        for name, before in PROGRAMS.items():
            client = self.bin / name
            client.write_text(CLIENT.format(python=sys.executable, address=address, before=before))
            client.chmod(0o755)
        command = [sys.executable, "-m", __name__, address, str(self.bin / "python")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        # A group of its own: with it ends whatever its programs have left.
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def close(self) -> None:
        """And whatever runs in it."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def serve(address: str, python: str) -> None:
    """Answer clients for ever."""
    for module in IMPORTED:
        importlib.import_module(module)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    print("ready", flush=True)
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _attend(client, python)
        client.close()


def _attend(client: socket.socket, python: str) -> None:
    """In a process that waits for the program, which may become another, and tells how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(client, 8, 3)
    with client.makefile("rb") as stream:
        text = stream.read(int.from_bytes(size, "little")).decode(errors="surrogateescape")
    count, *rest = text.split("\0")
    argv, (folder, *variables) = rest[: int(count)], rest[int(count) :]
    child = os.fork()
    if child == 0:
        client.close()
        for number, stream_ in enumerate(streams):
            os.dup2(stream_, number)
            os.close(stream_)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variable.split("=", 1) for variable in variables)
        sys.executable = python
        util.spawnv_passfds = _spawn_warm
        os._exit(_program(argv))
    for stream_ in streams:
        os.close(stream_)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    client.sendall(bytes([code if code >= 0 else 128 - code]))
    os._exit(0)


def _spawn_warm(path: object, argv: Sequence[object], kept: Sequence[int]) -> int:
    """In place of multiprocessing's own, which starts `python -c CODE` with these files open, and returns its
    number: a server that forks readers would import torch for 3 s each time.
    """
    if number := os.fork():
        return number
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_DFL)
    first = 3
    for file in [*sorted(kept), os.sysconf("SC_OPEN_MAX")]:
        os.closerange(first, file)
        first = file + 1
    gc.freeze()  # what the parent had open is not collected here: its numbers are those of other files now
    try:
        exec(str(argv[-1]), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
    finally:  # by SystemExit too, which is not for the program that was forked
        os._exit(0)


def _program(argv: list[str]) -> int:
    """Its exit code."""
    code = 0
    try:
        _run(argv)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _run(argv: list[str]) -> None:
    name, *rest = argv
    look = "LOOK_ONLY" in os.environ
    if name == "-m":
        name, *rest = rest
        if look and look_only.module(name, rest, Path(sys.executable).parent):
            return
        sys.argv = [name, *rest, *SHORTER.get(name if name == "experiments" else "".join(rest[:1]), [])]
        sys.path.insert(0, "")
    else:
        if look and Path(name).name in look_only.WITHOUT_OPTIONS:
            return
        sys.argv = [*argv, *SHORTER.get(Path(name).stem, [])]
        sys.path.insert(0, str(Path(name).resolve().parent))
    if look:
        look_only.install()
    if argv[0] == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif argv[0] == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(name, run_name="__main__")


if __name__ == "__main__":
    serve(*sys.argv[1:])
