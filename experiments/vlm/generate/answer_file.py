"""What the command `generate` does: one answer that streams, or a file of them that a later run completes."""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from experiments.vlm.data.document import Picture
from experiments.vlm.data.formats.record_shard import ImageValues
from experiments.vlm.generate.answering import Answering
from experiments.vlm.generate.prompt import Prompt
from experiments.vlm.generate.record import prompt_of
from torchtitan.config.errors import ConfigError, StorageError, UserError
from torchtitan.generation.engine import Answer, Request
from torchtitan.tools.disk import describe
from torchtitan.tools.logging import logger

Ask = Callable[[int, Prompt], Request]  # (number of a sample, its prompt)
NumberedRecord = tuple[int, Any, dict[str, Any]]  # number and id of a record, and the record
BEGINNING = b'{"id": '  # of a line


def answer_one(answering: Answering, content: list[str | Picture], ask: Ask) -> None:
    """Write the answer to standard output as it comes, on the first of the ranks, which all compute it.
    Raises UserError.
    """
    prompt, writes = answering.prompter.prompt([("user", content)]), dist.get_rank() == 0
    for event in answering.engine.answer([ask(0, prompt)]):
        if writes:
            sys.stdout.write(event.text)
            sys.stdout.flush()
    if writes:
        sys.stdout.write("\n")


class AnswerFile:
    """Answers as lines of JSON, each written whole as it ends; several ranks may append to one file."""

    def __init__(self, path: Path, writes: bool, samples: int):
        """`writes`: whether this rank writes. `samples`: answers to each record.

        Raises ConfigError for a line that is no answer.
        """
        self.path = path
        self.writes = writes
        self.samples = samples
        self.failed: set[Any] = set()  # ids
        self.done: set[tuple[Any, int]] = set()
        if path.exists():
            whole = _require_ours(path)
            os.truncate(path, whole)
            self.done = {(line["id"], line.get("sample", 0)) for _, line in _lines(path)}

    def left(self, id: Any) -> list[int]:
        """Samples of a record that are still to be answered."""
        return [sample for sample in range(self.samples) if (id, sample) not in self.done]

    def add(self, id: Any, sample: int, values: dict[str, Any]) -> None:
        """One line, in one write."""
        if "error" in values:
            self.failed.add(id)
        if self.writes:
            numbered = {"sample": sample} if self.samples > 1 else {}
            line = json.dumps({"id": id, **numbered, **values}, ensure_ascii=False) + "\n"
            self._append(line.encode(errors="backslashreplace"))  # half a pair of code units as JSON has it

    def _append(self, line: bytes) -> None:
        """Raises StorageError where the disk is full: nothing may stand behind half a line."""
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if os.write(file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise StorageError(
                f"{self.path}: {describe(error, self.path)}; the same command goes on"
            ) from None
        finally:
            os.close(file)


def answer_file(answering: Answering, path: Path, out: AnswerFile, images: ImageValues, ask: Ask) -> None:
    """Answer every record of a JSONL file without an answer yet; one that cannot be asked gets its error."""
    records = read_records(path)
    asked = [record for record in records if out.left(record[1])]
    logger.info(f"{path}: {len(records)} records, {len(records) - len(asked)} of them answered before")
    dist.barrier()  # nobody writes before all have read what was there
    data = answering.mesh.data
    mine = asked[data.get_local_rank() :: data.size()]
    bar = tqdm(total=sum(len(out.left(id)) for _, id, _ in mine), unit="answer", disable=None)
    names: dict[int, tuple[Any, int]] = {}
    for event in answering.engine.answer(_requests(mine, answering, out, images, ask, names)):
        if event.answer.ended:
            out.add(*names.pop(event.answer.request.number), as_line(event.answer))
            bar.update()
    bar.close()
    if out.failed:
        logger.warning(
            f"{len(out.failed)} of {len(mine)} records could not be asked: see their lines in {out.path}"
        )


def _requests(
    records: list[NumberedRecord],
    answering: Answering,
    out: AnswerFile,
    images: ImageValues,
    ask: Ask,
    names: dict[int, tuple[Any, int]],
) -> Iterator[Request]:
    """Made as the engine takes them; `names` gets (id, sample) by the number of each."""
    for number, id, record in records:
        try:
            prompt = prompt_of(record, images, answering.prompter)
        except UserError as error:
            for sample in out.left(id):
                out.add(id, sample, {"error": str(error)})
            continue
        for sample in out.left(id):
            names[number * out.samples + sample] = id, sample
            yield ask(number * out.samples + sample, prompt)


def as_line(answer: Answer) -> dict[str, Any]:
    """What a line says of an answer. `logprob`: of all its tokens together, natural."""
    return {"text": answer.text.given, "ended": answer.ended, "logprob": round(sum(answer.logprobs), 4)}


def read_records(path: Path) -> list[NumberedRecord]:
    """(number, id, record) of each line. Raises ConfigError for one that is no record, and for a bad id."""
    records: list[NumberedRecord] = []
    seen: set[Any] = set()
    for place, record in _lines(path):
        id = record.get("id", len(records))
        if not isinstance(id, str | int | float) or id != id:
            raise ConfigError(f"{path}, line {place}: the id {id!r} is neither a text nor a number")
        if id in seen:
            raise ConfigError(f"{path}, line {place}: the id {id!r} is there twice")
        seen.add(id)
        records.append((len(records), id, record))
    return records


def _require_ours(path: Path) -> int:
    """Bytes of its whole lines: a kill may leave one without its end. Raises ConfigError for another file."""
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    torn = text[whole:]
    if not (torn.startswith(BEGINNING) or BEGINNING.startswith(torn)):
        raise ConfigError(f"{path}: is no file of answers; give another one")
    for place, line in _lines(path, whole):
        if "id" not in line or "prompt" in line or "messages" in line:
            raise ConfigError(f"{path}, line {place}: is no answer; give another file")
    return whole


def _lines(path: Path, end: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line from 1, object) of a JSONL file, or of so many bytes of it; empty lines are none. Raises
    ConfigError for another one.
    """
    with open(path, "rb") as file:
        for place, line in enumerate(file, 1):
            if end is not None and file.tell() > end:
                return
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise ValueError("not an object")
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}, line {place}: {error}") from None
            yield place, value
