"""Tasks: how a question is worded, how it is answered, and which scores it gets. A task is a row of TASKS.
Every command checks names of tasks, so this file reads no records and imports little.

caption            a text about the picture, against those of people
vqa, exact_match, anls, relaxed_accuracy    a short answer
transcription      what is written: the share of its words, and of records without an error
multiple_choice    the likelihood of each choice, as it is and for each of its tokens
mmmu, mmmu_open    the answer that a response concludes, as MMMU reads it
perplexity         of held-out documents, pictures and all
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.vlm.data.document import Picture
from torchtitan.config.errors import ConfigError, did_you_mean, require

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
Way = Literal["generate", "choose", "read"]
Line = dict[str, Any]  # what the model said to a record, and its scores: see asking.py
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """One record."""

    number: int
    id: str
    content: list[str | Picture]  # what is asked, pictures in their places
    answers: list[str]
    choices: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of the choices, where the record has any
    fault: str = ""  # of an image that cannot be read: then `content` has the question alone


@dataclass(frozen=True)
class Task:
    """To add one: a row below."""

    way: Way  # write an answer; weigh each choice; read a document
    metrics: tuple[str, ...] = ()  # of METRICS, over what was written
    optional: tuple[str, ...] = ()  # counted where what they need is installed
    wording: str = ""  # after the question, where the model knows conversations
    instead: str = ""  # in place of a question that the record does not have
    lists_choices: bool = False
    max_tokens: int = 32

    def content(self, question: Question, converses: bool) -> list[str | Picture]:
        """What the user says. A model without conversations gets the record alone; a record without a
        question its images alone, as a caption follows them: without the line break that separates them from
        a question.
        """
        asked = any(isinstance(part, str) and part.strip() for part in question.content)
        shown = question.content
        if not (asked or converses):
            shown = [part for part in shown if isinstance(part, Picture)]
        text = "" if asked or not converses else self.instead
        if self.lists_choices:
            text += "".join(f"\n{letter}. {choice}" for letter, choice in named(question).items())
        text += self.wording if converses else ""
        return [*shown, *filter(None, [text])]


def named(question: Question) -> dict[str, str]:
    """Letter -> choice."""
    return dict(zip(LETTERS, question.choices, strict=False))


def right_choice(question: Question) -> int:
    """Which choice is the answer: its text or its name, else, where it has none, its letter; or its number
    from 0, where no names are numbers. Raises ConfigError.
    """
    answer, count = question.answers[0] if question.answers else "", len(question.choices)
    numbers = [] if any(map(str.isdecimal, question.names)) else [str(number) for number in range(count)]
    for names in (question.choices, question.names or list(LETTERS[:count]), numbers):
        if answer in names:
            return names.index(answer)
    raise ConfigError(f"its answer {answer!r} is none of its {count} choices")


CAPTIONS = ("cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l")
TASKS = {
    "caption": Task("generate", CAPTIONS, ("meteor",), instead="Describe the image.", max_tokens=64),
    "vqa": Task("generate", ("vqa_accuracy",), wording=SHORT),
    "exact_match": Task("generate", ("exact_match",), max_tokens=128),
    "anls": Task("generate", ("anls",), wording=SHORT),
    "relaxed_accuracy": Task("generate", ("relaxed_accuracy",), wording=SHORT),
    "transcription": Task("generate", ("word_accuracy", "exact_match"), max_tokens=128),
    "multiple_choice": Task("choose"),
    "mmmu": Task("generate", ("mmmu_multiple_choice",), wording=LETTER, lists_choices=True, max_tokens=128),
    "mmmu_open": Task("generate", ("mmmu_open",), wording=SHORT, max_tokens=128),
    "perplexity": Task("read"),
}


class TaskFile(NamedTuple):
    """A task over a file."""

    label: str  # the task's name, and the file's where a task has several
    name: str  # of TASKS
    path: str


def parse_tasks(given: Sequence[str], key: str) -> list[TaskFile]:
    """NAME=FILE of each. `key`: begins an error, before what was given. Raises ConfigError."""
    asked = []
    for each in given:
        name, mark, path = each.partition("=")
        require(bool(mark and path), f"{key}{each}: must be NAME=FILE")
        require(name in TASKS, f"{key}{each}: no such task{did_you_mean(name, TASKS)}")
        twice = sum(other.startswith(name + "=") for other in given) > 1
        asked.append(TaskFile(f"{name}-{Path(path).stem}" if twice else name, name, path))
    labels = [each.label for each in asked]
    require(len(set(labels)) == len(labels), f"{key.rstrip()} two files of one task have one name")
    return asked


def metric_arguments(metric: str, questions: list[Question]) -> tuple[list[list[str]], dict[str, Any]]:
    """Right answers of each record as the metric takes them, and its keyword arguments."""
    if metric != "mmmu_multiple_choice":
        return [question.answers for question in questions], {}
    choices = [named(question) for question in questions]
    right = [[LETTERS[right_choice(question)]] for question in questions]
    return right, {"all_choices": list(map(list, choices)), "index2ans": choices}
