"""The small run as a program, with an accident in it.

    python -m tests.faults.accident --job.config_file X ...

KILL_AFTER=n in the environment: SIGKILL before step n + 1; the other ACCIDENTS likewise; FAIL_AFTER=n: an
error then; AWAY_AFTER=n: the data are away then; WAIT_AFTER=n: they let a signal wait. WAIT_IN_THE_END:
SIGTERM comes while held-out data are waited for. ACCIDENT_RANK: the one rank that gets the signals; without
it all do.
"""

import os
import signal
import sys
import threading

import torch

from experiments.__main__ import in_one_line
from experiments.vlm.config import VLMJobConfig
from tests.reference.small_run import SMALL
from torchtitan import train
from torchtitan.config.errors import HangingRead
from torchtitan.config.parse import parse
from torchtitan.evaluator import Evaluator
from torchtitan.tools.logging import init_logger
from torchtitan.tools.signals import StopAsked

ACCIDENTS = {
    "KILL": [signal.SIGKILL],
    "TERM": [signal.SIGTERM],
    "INT": [signal.SIGINT],
    "INT_TWICE": [signal.SIGINT] * 2,
}


class Trainer(train.Trainer):
    def train_step(self) -> bool:
        rank = os.environ.get("RANK", "0")
        for name, numbers in ACCIDENTS.items():
            now = os.environ.get(f"{name}_AFTER") == str(self.state.step)
            for number in numbers if now and os.environ.get("ACCIDENT_RANK", rank) == rank else ():
                os.kill(os.getpid(), number)
        if os.environ.get("AWAY_AFTER") == str(self.state.step):
            threading.Thread(target=threading.Event().wait).start()  # a read that nobody can end
            raise HangingRead("a.tar: away")
        if os.environ.get("WAIT_AFTER") == str(self.state.step):
            raise StopAsked
        assert os.environ.get("FAIL_AFTER") != str(self.state.step), "an accident"
        return super().train_step()


def stopped_while_judging(self: Evaluator, stopped: bool) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    raise StopAsked


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    torch.set_num_threads(1)
    init_logger()
    train.Trainer = Trainer  # type: ignore[misc]
    if "WAIT_IN_THE_END" in os.environ:
        Evaluator.judge = stopped_while_judging  # type: ignore[method-assign]
    return in_one_line(lambda: train.main(parse(argv, {"vlm": VLMJobConfig}), SMALL))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
