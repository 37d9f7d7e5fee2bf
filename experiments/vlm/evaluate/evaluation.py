"""A model answers the questions of a task, record by record; ranks share them, and a killed run is resumed.

OUT/NAME.part.jsonl   a line for each record as it ends
OUT/NAME.jsonl        all of them in order with their scores, once the last has ended
OUT/asked.json        what decides the answers: who goes on must ask the same
OUT/summary.json      metrics with their intervals, and the versions of everything
OUT/NAME.html         pictures, questions, answers and scores, the worst first
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from experiments.vlm.config import Data
from experiments.vlm.evaluate.asking import DIGITS, Asking, QuestionSet
from experiments.vlm.evaluate.questions import Questions
from experiments.vlm.evaluate.results_page import results_page
from experiments.vlm.evaluate.task_scores import score, summarise
from experiments.vlm.evaluate.tasks import Line, Task
from experiments.vlm.generate.answer_file import AnswerFile
from experiments.vlm.generate.answering import Answering
from torchtitan.components.saved_config import differences
from torchtitan.config.errors import UserError, require
from torchtitan.tools.disk import write_whole
from torchtitan.tools.logging import logger

SHOWN = 10  # records that could not be asked, in a summary


class Evaluation:
    """One task over one file. Raises UserError that names the record."""

    def __init__(
        self,
        name: str,
        task: Task,
        path: str,
        out: Path,
        answering: Answering,
        data: Data,
        control: str = "",
    ):
        """`control`: how images are spoilt (data/controls.py)."""
        self.name = name
        self.answering = answering
        questions = Questions(path, data, task.way == "read", control)
        require(len(questions) > 0, f"{path}: holds no record")
        self.asking = Asking(task, questions, answering.prompter)
        self.path = out / f"{name}.jsonl"
        self.part = AnswerFile(out / f"{name}.part.jsonl", answering.mesh.leads, samples=1)

    def run(self) -> list[Line]:
        """Lines of all records in order, on every rank: of this run and of earlier ones."""
        if not self.path.exists():
            count, data = len(self.asking.records), self.answering.mesh.data
            left = [number for number in range(count) if self.part.left(number)]
            logger.info(f"{self.name}: {count} records, {count - len(left)} of them answered before")
            dist.barrier()  # nobody writes before all have read what was there
            mine = left[data.get_local_rank() :: data.size()]
            for number in mine:
                self.asking.question(number, pictures=False)
            answered = self.asking.lines(self.answering, mine)
            for number, line in tqdm(answered, total=len(mine), unit="record", disable=None):
                self.part.add(number, 0, line)
            dist.barrier()
        lines = self._all_lines()
        if lines and all("error" in line for line in lines):
            dist.barrier()  # all ranks have read them
            self.part.path.unlink(missing_ok=True)  # so that they are asked again once they are mended
            raise UserError(f"{self.name}: none of {len(lines)} records can be asked: {lines[0]['error']}")
        return lines

    def _all_lines(self) -> list[Line]:
        path = self.path if self.path.exists() else self.part.path
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        return sorted(lines, key=lambda line: line["id"])


def write_results(
    path: Path, name: str, asking: Asking, lines: list[Line], page_limit: int
) -> dict[str, Any]:
    """Write all lines with their scores to `path`, and the page next to it. Returns what a summary says.

    Raises UserError where they cannot be scored.
    """
    records, task = asking.records, asking.task
    questions = [records.read(number, pictures=False) for number in range(len(lines))]
    scores, left_out = score(task, questions, lines)
    for number, line in enumerate(lines):
        each = {name: found.per_sample[number] for name, found in scores.items()}
        line["scores"] = {name: round(one, DIGITS) for name, one in each.items() if not math.isnan(one)}
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    page = results_page(name, task, records, lines, page_limit)
    path.with_suffix(".html").write_text(page, encoding="utf-8", errors="backslashreplace")
    summary = {"file": records.path, "metrics": summarise(scores), "left_out": left_out}
    lost = [line["error"] for line in lines if "error" in line]
    return summary | ({"not_asked": {"records": len(lost), "first": lost[:SHOWN]}} if lost else {})


def evaluate(
    evaluations: list[Evaluation], out: Path, about: dict[str, Any], page_limit: int
) -> dict[str, Any]:
    """Run all tasks; the first rank writes their files and returns the summary, the others an empty one.

    Raises UserError where `out` holds answers of another model, with other options or to other records.
    """
    path = out / "summary.json"
    _require_same(out / "asked.json", about, {each.name: each.asking.records for each in evaluations})
    found = {evaluation.name: evaluation.run() for evaluation in evaluations}
    if dist.get_rank() > 0:
        return {}
    summaries = {}
    for each in evaluations:
        summaries[each.name] = write_results(each.path, each.name, each.asking, found[each.name], page_limit)
        each.part.path.unlink(missing_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {"tasks": {}}
    summary = {"about": about, "tasks": before["tasks"] | summaries}
    write_whole(path, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def _require_same(path: Path, about: dict[str, Any], records: dict[str, QuestionSet]) -> None:
    """Answers of two models in one folder would be scored as those of one, and those to one file as those to
    another. `records`: by the name of their task.
    """
    model = {name: about.get(name) for name in ("model", "chat_template")} | about.get("options", {})
    files = {name: f"{os.path.abspath(each.path)}, {len(each)} records" for name, each in records.items()}
    now = {"model": model, "files": files}
    dist.barrier()
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else now
    dist.barrier()
    again = {name: file for name, file in files.items() if name in before["files"]}
    others = differences(before["model"], model)
    others += differences({name: before["files"][name] for name in again}, again)
    changed = ", ".join(map(str, others))
    require(not others, f"{path.parent} holds other answers: {changed}; give another --out")
    if dist.get_rank() == 0:
        write_whole(path, json.dumps(now | {"files": before["files"] | files}, indent=1) + "\n")
