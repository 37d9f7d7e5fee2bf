"""Tasks of a run that trains: the present model answers records that are in memory from the run's start.

DUMP/tasks/step-N/NAME.jsonl, NAME.html    each record with its scores; the page (see evaluation.py)
DUMP/tasks/step-N/summary.json             figures with their intervals
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.evaluate.asking import Asking
from experiments.vlm.evaluate.evaluation import write_results
from experiments.vlm.evaluate.exhibits import exhibit
from experiments.vlm.evaluate.questions import Questions
from experiments.vlm.evaluate.tasks import TASKS, Line, Question, TaskFile, parse_tasks
from experiments.vlm.generate.answering import answering_of, prompter_of
from experiments.vlm.generate.layout import lent, share_in_training
from experiments.vlm.parallelism.sharing import sharers, slot_sizes
from experiments.vlm.processor import spoken_template
from torchtitan.components.metrics import Values
from torchtitan.components.sinks import Exhibit
from torchtitan.components.tokenizer import Tokenizer
from torchtitan.components.validation import TASKS_FOLDER, TASKS_SUMMARY
from torchtitan.config.errors import require
from torchtitan.distributed.collectives import from_all_ranks, from_first_rank
from torchtitan.distributed.mesh import Mesh
from torchtitan.tools.disk import write_whole
from torchtitan.tools.logging import warn_once

PAGE_LIMIT = 50  # records on a page


class HeldRecords:
    """Records of a file that a rank needs, read once, so that nothing can be missing later."""

    def __init__(self, questions: Questions, count: int, numbers: Iterable[int]):
        """`count`: of the records that are asked, on all ranks together."""
        self.path = questions.path
        self.count = count
        self.held = {number: questions.read(number) for number in numbers}

    def __len__(self) -> int:
        return self.count

    def read(self, number: int, pictures: bool = True) -> Question:
        """A record that is held, with its pictures."""
        return self.held[number]


class TrainingTasks:
    """The tasks of validation.tasks. Raises UserError at once for what would be wrong with them later."""

    def __init__(self, job: VLMJobConfig, tokenizer: Tokenizer, rank: int, ranks: int):
        """Each of `ranks` ranks answers records of its own; the first scores those of all."""
        self.job = job
        self.rank = rank
        self.ranks = ranks
        self.warned: set[str] = set()
        asked = parse_tasks(job.validation.tasks, "validation.tasks = ")
        self.places = job.training.seq_len + max(TASKS[each.name].max_tokens for each in asked)
        sharing = sharers(job, slot_sizes(job))
        self.prompter = prompter_of(job, tokenizer, spoken_template(job), self.places, sharing)
        self.tasks = {each.label: self._open(each) for each in asked}

    def run(self, parts: Sequence[nn.Module], mesh: Mesh, step: int) -> tuple[Values, list[Exhibit]]:
        """TASK/METRIC -> figure, and a few records to look at, on all ranks. Raises StopAsked on all of them,
        between two tokens, where a signal came.
        """
        model: Any
        (model,) = parts
        with lent(model, mesh, self.job, self.job.validation.task_sequences, self.places) as cache:
            share = share_in_training(mesh, self.job)
            answering = answering_of(model, cache, self.prompter, mesh, share=share)
            mine = {
                label: [
                    {"id": number, **line}
                    for number, line in asking.lines(answering, self._mine(len(asking.records)))
                ]
                for label, asking in self.tasks.items()
            }
        found = from_all_ranks(mine if mesh.leads else {})
        return from_first_rank(lambda: self._judge(found, step))

    def _mine(self, count: int) -> range:
        return range(self.rank, count, self.ranks)

    def _open(self, asked: TaskFile) -> Asking:
        task, limit = TASKS[asked.name], self.job.validation.task_records
        questions = Questions(asked.path, self.job.data, documents=task.way == "read")
        require(len(questions) > 0, f"{asked.path}: holds no record")
        count = len(questions) if limit < 0 else min(limit, len(questions))
        numbers = range(count) if self.rank == 0 else self._mine(count)
        asking = Asking(task, HeldRecords(questions, count, numbers), self.prompter)
        for number in self._mine(count):
            asking.prompts(number)
        return asking

    def _judge(self, found: list[dict[str, list[Line]]], step: int) -> tuple[Values, list[Exhibit]]:
        """Figures and exhibits from the lines of all ranks."""
        folder = Path(self.job.job.dump_folder) / TASKS_FOLDER / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        values: Values = {}
        exhibits, summaries = [], {}
        for label, asking in self.tasks.items():
            lines = [line for rank in found for line in rank.get(label, [])]
            lines.sort(key=lambda line: line["id"])
            summaries[label] = write_results(folder / f"{label}.jsonl", label, asking, lines, PAGE_LIMIT)
            values |= {
                f"{label}/{name}": figure["value"] for name, figure in summaries[label]["metrics"].items()
            }
            exhibits += self._exhibits(label, asking, lines)
            self._warn(
                f"validation.tasks: {label} leaves out: {reason}" for reason in summaries[label]["left_out"]
            )
        write_whole(folder / TASKS_SUMMARY, json.dumps({"step": step, "tasks": summaries}, indent=1) + "\n")
        return values, exhibits

    def _warn(self, lines: Iterable[str]) -> None:
        """Warn of each line once in a run."""
        for line in lines:
            if line not in self.warned:
                warn_once(line)
            self.warned.add(line)

    def _exhibits(self, label: str, asking: Asking, lines: list[Line]) -> list[Exhibit]:
        """Always the same records, so that one sees what becomes of each."""
        most = 0 if asking.task.way == "read" else min(self.job.validation.task_pictures, len(lines))
        numbers = [place * len(lines) // most for place in range(most)]
        return [exhibit(f"{label}/{n}", asking.records.read(n), lines[n]) for n in numbers]


def open_tasks(job: VLMJobConfig, tokenizer: Tokenizer, rank: int, ranks: int) -> TrainingTasks | None:
    """None where the job asks for none."""
    return TrainingTasks(job, tokenizer, rank, ranks) if job.validation.tasks else None
