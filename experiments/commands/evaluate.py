"""How good is a model?

    torchtitan-vlm evaluate --hf FOLDER --task vqa=textvqa.parquet --task caption=coco.jsonl --out results
    torchtitan-vlm evaluate --job.dump_folder outputs/run --task multiple_choice=ai2d.jsonl --out results

A record is {"question", "image" or "images", "answers", "choices"} in JSONL, parquet, Arrow, TSV or a tar.
--out gets a line for each record, summary.json with 95 % intervals and the versions of everything, and a page
of pictures with questions, answers and scores. A run that was cut goes on; one that is done is shown again. A
file may be embedded:WORLD/SPLIT. A record with an image that cannot be read counts as answered with nothing;
the summary says how many are. Several processes share the records:

    python -m torchtitan.launch --processes 2 experiments.commands evaluate ...
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.commands.model_options import ModelOptions, chosen_template, model_job, open_model
from experiments.vlm.check import check_path
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.evaluate import tasks
from experiments.vlm.saved_model import read_with
from torchtitan.config.check import check_options
from torchtitan.config.errors import require
from torchtitan.tools.disk import require_writable
from torchtitan.tools.lock import locked
from torchtitan.tools.logging import init_logger, logger
from torchtitan.tools.signals import resumable


@dataclass
class Options(ModelOptions):
    """What is asked, and where the answers go."""

    # NAME=FILE, with a name of --list; may be given several times
    task: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    # also with blanked and with shuffled images, as NAME-blanked and NAME-shuffled
    controls: bool = False
    out: str = ""  # a folder for answers, summary.json and pages
    list: bool = False  # say what tasks there are
    sequences: int = 8  # answered at one time
    page_limit: int = 200  # records on a task's page


def main(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    init_logger()
    options, job = model_job(argv, Options, __doc__)
    if options.list:
        print((tasks.__doc__ or "").strip())
        return 0
    check_options(options, {"sequences": ">= 1", "page_limit": ">= 0"})
    asked, out = asked_tasks(options), Path(options.out)
    busy = f"--out {out}: another evaluation is writing there; wait for it, or give another folder"
    with locked(out / "lock", busy), resumable():
        summary = answer(options, job, asked)
    if summary:
        logger.info(table(summary))
        logger.info(f"{out / 'summary.json'}, and a page of each task next to it")
    return 0


def answer(options: Options, job: VLMJobConfig, asked: list[tasks.TaskFile]) -> dict[str, Any]:
    """The summary, on the first rank. Raises UserError. Imports torch."""
    from experiments.vlm.data.controls import CONTROLS
    from experiments.vlm.evaluate.evaluation import Evaluation, evaluate
    from torchtitan.distributed.process_group import close_process_group

    out, most = Path(options.out), max(tasks.TASKS[name].max_tokens for _, name, _ in asked)
    answering = open_model(options, job, options.sequences, most)
    template = chosen_template(options, job) or None
    about: dict[str, Any] = {"model": job.checkpoint.initial_load_path, "chat_template": template}
    about |= {"options": read_with(job)} | versions()
    controls = ("", *(CONTROLS if options.controls else ()))
    try:
        evaluations = [
            Evaluation(
                f"{label}-{control}" if control else label,
                tasks.TASKS[name],
                path,
                out,
                answering,
                job.data,
                control,
            )
            for label, name, path in asked
            for control in controls
        ]
        return evaluate(evaluations, out, about, options.page_limit)
    finally:
        close_process_group()


def asked_tasks(options: Options) -> list[tasks.TaskFile]:
    """The tasks of --task, whose files are there. Raises ConfigError."""
    require(bool(options.task), "no task: give --task NAME=FILE (--list says which there are)")
    require(bool(options.out), "nowhere to write: give --out FOLDER")
    require_writable(Path(options.out), "--out")
    asked = tasks.parse_tasks(options.task, "--task ")
    for _, name, path in asked:
        if path.startswith("embedded:"):
            check_path(path, f"--task {name}")
        else:
            require(os.path.isfile(path), f"--task {name}={path}: no such file (looked from {os.getcwd()})")
    return asked


def versions() -> dict[str, str]:
    """Versions of what decides a figure."""
    from importlib.metadata import version

    import torchtitan

    found = {name: version(name) for name in ("torch", "numpy", "pillow", "simplejpeg")}
    return {"torchtitan-vlm": torchtitan.__version__} | found


def table(summary: dict[str, Any]) -> str:
    """The summary as lines for the console."""
    lines = [f"{'task':24} {'metric':22} {'value':>9}   95 % interval   records"]
    for task, summary_of_task in summary["tasks"].items():
        for metric, figure in summary_of_task["metrics"].items():
            interval = f"{figure['low']:.2f} ... {figure['high']:.2f}"
            lines.append(
                f"{task:24} {metric:22} {figure['value']:9.2f}   {interval:15} {figure['records']:7}"
            )
        lines += [f"{task:24} left out: {reason}" for reason in summary_of_task["left_out"]]
        if lost := summary_of_task.get("not_asked"):
            lines.append(
                f"{task:24} not asked: {lost['records']} records, the first of them {lost['first'][0]}"
            )
    return "\n".join(lines)
