"""Processes of tests, forked from a server that has imported the trainer: importing torch takes seconds.

multiprocessing keeps one fork server a process, with what its first user wants imported. The loader's workers
are such users, so this is a server of its own. It never runs an operation, since a fork copies no threads.
"""

from multiprocessing import context, forkserver, popen_forkserver
from unittest import mock

_server = forkserver.ForkServer()
_server.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",
        "torch.distributed.pipelining",
        "torch.distributed.checkpoint",
        "tests.distributed.layouts",
        "tests.faults.accident",
        "tests.frozen_heap",
    ]
)


class _Popen(popen_forkserver.Popen):
    def _launch(self, process_obj) -> None:
        with mock.patch.object(forkserver, "connect_to_new_process", _server.connect_to_new_process):
            super()._launch(process_obj)


class Process(context.ForkServerProcess):
    """A `multiprocessing.Process`."""

    @staticmethod
    def _Popen(process_obj) -> _Popen:
        return _Popen(process_obj)
