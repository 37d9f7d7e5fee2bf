"""A progress bar, only where a person is watching a terminal."""

import sys
from contextlib import ExitStack

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from torchtitan.tools.logging import logger


class Progress:
    """A bar of steps on standard output, with log lines above it; nothing where that is no terminal."""

    def __init__(self, steps: int, done: int, wanted: bool):
        self.stack = ExitStack()
        self.bar = None
        if wanted and sys.stdout.isatty():
            self.bar = self.stack.enter_context(
                tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True)
            )
            self.stack.enter_context(logging_redirect_tqdm([logger]))

    def after_step(self, step: int) -> None:
        """Moves the bar to that step."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def close(self) -> None:
        """Ends the bar, and log lines go where they went before."""
        self.stack.close()
