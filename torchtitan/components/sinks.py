"""Where the numbers of a run are kept: metrics.jsonl; on request TensorBoard and Weights & Biases."""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from torchtitan.config.errors import ConfigError
from torchtitan.config.job import JobConfig
from torchtitan.tools.disk import write_whole
from torchtitan.tools.wandb_login import OFFLINE

HISTORY = "metrics.jsonl"
WANDB_ID = "wandb_id"


@dataclass(frozen=True)
class Exhibit:
    """What people look at: something that the model was shown, and what it made of it."""

    name: str  # the same in every step
    pixels: np.ndarray  # uint8 [H, W, 3]
    text: str


class Sink(Protocol):
    """Takes the numbers of a step. `values`: name -> number, in all sinks under the same names."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps the numbers of one step."""

    def show(self, step: int, exhibits: Sequence[Exhibit]) -> None:
        """Keeps what people look at."""

    def close(self) -> None:
        """Writes out what is held back, and ends files and connections."""


class History:
    """metrics.jsonl: one record a line. A run that goes on from a step forgets what it wrote after it."""

    def __init__(self, folder: Path, first_step: int):
        self.path = folder / HISTORY
        kept = [record for record in read_history(folder) if record["step"] <= first_step]
        write_whole(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line, on disk when this returns."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def show(self, step: int, exhibits: Sequence[Exhibit]) -> None:
        """Nothing: the maker of exhibits keeps them in the dump folder too."""

    def close(self) -> None:
        """Nothing is open between two lines."""


def read_history(folder: Path) -> list[dict[str, float]]:
    """The records of metrics.jsonl, without a line that was cut short or damaged when the run was killed."""
    path = folder / HISTORY
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # no JSON, or no UTF-8
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "step" in record]


def charted(history: Iterable[Mapping[str, float]]) -> set[str]:
    """Names of the figures that were ever other than zero: no chart is of zeros alone."""
    return {name for record in history for name, value in record.items() if value != 0}


class TensorBoard:
    """Event files.

    What an earlier launch wrote after the step that this one goes on from is hidden, not shown twice.
    """

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A scalar for each name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def show(self, step: int, exhibits: Sequence[Exhibit]) -> None:
        """An image of each name, and its text, whose lines stay lines."""
        for exhibit in exhibits:
            self.writer.add_image(exhibit.name, exhibit.pixels, step, dataformats="HWC")
            self.writer.add_text(exhibit.name, exhibit.text.replace("\n", "  \n"), step)

    def close(self) -> None:
        """Writes out the events that are held back."""
        self.writer.close()


class WandB:
    """A Weights & Biases run, the same one whenever the dump folder's run goes on: its id is kept there.

    Raises ConfigError where it cannot be opened.
    """

    def __init__(self, folder: Path, job: JobConfig):
        import wandb

        kept, options = folder / WANDB_ID, job.metrics
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "torchtitan"),
                name=options.wandb_name or os.environ.get("WANDB_NAME") or folder.resolve().name,
                group=options.wandb_group or None,
                notes=job.job.description or None,
                id=kept.read_text().strip() if kept.exists() else None,
                resume="allow",
                dir=str(folder),
                config=asdict(job),
            )
        except wandb.errors.Error as error:  # no network, no such project
            detail = " ".join(str(error).split())
            raise ConfigError(f"metrics.enable_wandb: {detail}; {OFFLINE}") from None
        write_whole(kept, self.run.id + "\n")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Sends the numbers, or keeps them where WANDB_MODE is offline."""
        # Steps that are trained again after a kill are there already, and would be refused one by one.
        if step >= self.run.starting_step:
            self.run.log(dict(values), step=step)

    def show(self, step: int, exhibits: Sequence[Exhibit]) -> None:
        """An image of each name, with its text as caption."""
        import wandb

        self.write(step, {each.name: wandb.Image(each.pixels, caption=each.text) for each in exhibits})

    def close(self) -> None:
        """Ends the run and waits until all is sent."""
        self.run.finish()


def open_sinks(job: JobConfig, first_step: int) -> list[Sink]:
    """The sinks that the job asks for; makes its folder. Raises ConfigError where wandb does not open."""
    folder = Path(job.job.dump_folder)
    folder.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = [History(folder, first_step)]
    if job.metrics.enable_tensorboard:
        sinks.append(TensorBoard(folder / job.metrics.save_tb_folder, first_step))
    if job.metrics.enable_wandb:
        sinks.append(WandB(folder, job))
    return sinks
