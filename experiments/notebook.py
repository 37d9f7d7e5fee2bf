"""For a notebook or a program of yours: a job, its batches, a picture of one, a model with its weights.

    from experiments.notebook import load_job, open_loader, open_model, show_batch

    job = load_job("vlm_debug")
    loader = open_loader(job)
    batch = next(loader).batches[0]
    show_batch(loader, batch)
    model = open_model(load_job("outputs/vlm_debug"))

They take the ways of the commands, for one process. What the user can mend is a UserError of one line. Torch
is imported by the call that needs it.
"""

from collections.abc import Sequence
from dataclasses import is_dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.__main__ import CONFIG_CLASSES
from experiments.vlm.check import check_estimated, check_sources
from experiments.vlm.config import VLMJobConfig, VLMParallelism
from experiments.vlm.saved_model import use_checkpoint, use_hf_folder, with_saved
from torchtitan.components.checkpoint_folder import complete_steps
from torchtitan.config.errors import require
from torchtitan.config.layout import resolve_batch
from torchtitan.config.parse import parse
from torchtitan.config.table import from_table

if TYPE_CHECKING:
    from PIL.Image import Image

    from experiments.vlm.batch import Batch
    from experiments.vlm.data.loader import Loader
    from experiments.vlm.model.vlm import VLM


def load_job(source: str | Path, *options: str | float) -> VLMJobConfig:
    """`source`: a TOML file, the name of a job that comes with the package, the folder of a run, or a Hugging
    Face folder. `options`: as on the command line, "--training.seq_len", "256".

    What is changed in it later is checked where it is used. Raises ConfigError.
    """
    source, given = str(source), list(map(str, options))
    if (Path(source) / "config.json").is_file():
        job = _parse(given)
        use_hf_folder(job, source, given)
    elif Path(source).is_dir():
        argv = with_saved(["--job.dump_folder", source])
        require(len(argv) > 2, f"{source}: no run (config.toml) and no Hugging Face folder (config.json)")
        job = _parse([*argv, *given])
    else:
        job = _parse(["--job.config_file", source, *given])
    check_estimated(job)
    return job


def _parse(argv: Sequence[str]) -> VLMJobConfig:
    job = parse(argv, CONFIG_CLASSES)
    assert isinstance(job, VLMJobConfig)
    return job


def _for_one_process(job: VLMJobConfig) -> VLMJobConfig:
    """A copy: the layout of its run does not change what is read and computed.

    Raises ConfigError for what was changed in it as no option allows, be it the name or the type.
    """
    job = from_table(type(job), _tables(job))
    check_estimated(job)
    job.parallelism = VLMParallelism()
    return job


def _tables(value: Any) -> Any:
    """Options as TOML has them: what is None by default is not there."""
    if is_dataclass(value):
        fields = vars(value).items()
        return {k: _tables(v) for k, v in fields if v is not None or getattr(type(value), k, v) is not None}
    return list(map(_tables, value)) if isinstance(value, list) else value


def open_loader(job: VLMJobConfig, split: Literal["train", "validation"] = "train") -> "Loader":
    """What a run reads, all of its slots. `next` gives a step, whose `batches` are host tensors
    (experiments/vlm/batch.py) that hold until the next one.

    Nothing is written to the job's dump folder; `close` ends its worker processes. Raises UserError.
    """
    require(split in ("train", "validation"), f"split = {split!r}: must be train or validation")
    job = _for_one_process(job)
    check_sources(job)
    job.training.global_batch_size = resolve_batch(job, 1).global_
    job.job.dump_folder = ""
    from experiments.vlm.data.loader import Loader
    from experiments.vlm.weights.embedding_rows import open_tokenizer

    return Loader(job, open_tokenizer(job), split=split)


def show_batch(loader: "Loader", batch: "Batch", slots: int = 1) -> "Image":
    """A picture of the first slots of a batch of this loader, read back from its tensors."""
    from PIL import Image

    from experiments.vlm.view.picture import draw_slots
    from experiments.vlm.view.slot_view import read_slot

    tokenizer, merge = loader.setup.tokenizer, loader.setup.plan.merge_size
    rows = range(min(slots, loader.shape.slots))
    views = [read_slot(batch, row, 0, row, loader.shape, merge, tokenizer) for row in rows]
    picture = BytesIO()
    draw_slots(views, loader.shape, tokenizer, "A packed batch", picture)
    return Image.open(picture)


def open_model(job: VLMJobConfig, checkpoint: str = "") -> "VLM":
    """The model as a plain module in float32, for evaluation, on the GPU if there is one:
    `model(**batch.tensors)` is the summed loss of a batch whose tensors are there, then that of each source.

    `checkpoint`: step-N of the job's run, or the path of one; empty: the latest, or where the run has none
    and the job starts from a Hugging Face folder, what it starts from. Raises UserError.
    """
    job = _for_one_process(job)
    saved = complete_steps(Path(job.job.dump_folder) / job.checkpoint.folder)
    published = not (checkpoint or saved) and job.checkpoint.initial_load_in_hf
    path = None if published else use_checkpoint(job, checkpoint)
    import torch

    from experiments.vlm.spec import SPEC
    from torchtitan.loaded_model import open_plain_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = open_plain_model(job, SPEC, device, SPEC.load_tokenizer(job), path)
    return model
