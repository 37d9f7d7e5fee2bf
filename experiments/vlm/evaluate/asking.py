"""Records of a task become prompts, and what the model said to each becomes a line.

{"prediction": "...", "ended": "stop"}                 a task that writes an answer
{"logprobs": [-1.2, -3.4], "tokens": [2, 3]}           one that weighs each choice
{"logprob": -56.7, "tokens": 20}                       one that reads a document
{"prediction": "", "error": "..."}, or with nothing    a record that cannot be asked: an image is unreadable,
in the others' place                                   or it is too long
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from experiments.vlm.evaluate.likelihood import Reader
from experiments.vlm.evaluate.tasks import Line, Question, Task, Way, right_choice
from experiments.vlm.generate.answering import Answering
from experiments.vlm.generate.prompt import Prompt, Prompter, Turns
from torchtitan.config.errors import UserError, require
from torchtitan.generation.engine import Request

DIGITS = 4  # of log-probabilities, in which all layouts agree
NOTHING: dict[Way, Line] = {  # lines of a record that could not be asked
    "generate": {"prediction": ""},
    "choose": {"logprobs": [], "tokens": []},
    "read": {"logprob": 0.0, "tokens": 0},
}


class Unasked(UserError):
    """A record cannot be asked, and the others can: an image cannot be read, or it is too long."""


class QuestionSet(Protocol):
    """Where records come from: a file (questions.py), or memory."""

    path: str

    def __len__(self) -> int: ...

    def read(self, number: int, pictures: bool = True) -> Question:
        """One record; without `pictures` its texts may do."""


class Asking:
    """One task over records. Raises UserError that names the record; Unasked where it alone is lost."""

    def __init__(self, task: Task, records: QuestionSet, prompter: Prompter):
        self.task = task
        self.records = records
        self.prompter = prompter

    def prompts(self, number: int) -> list[Prompt]:
        """All that the model reads of a record: the question, and it with each choice; or the document."""
        question = self.question(number)
        with self._asking(question):
            if self.task.way == "read":
                return [self.prompter.document(question.content)]
            turns = self._turns(question)
            choices = self._continuations(question) if self.task.way == "choose" else []
            answered = [self.prompter.answered(turns, choice) for choice in choices]
            return [self.prompter.prompt(turns), *answered]

    def question(self, number: int, pictures: bool = True) -> Question:
        """One record, with the answers and choices that the task needs."""
        question = self.records.read(number, pictures)
        try:
            if self.task.way == "generate":
                require(bool(question.answers), "it has no answer, so what is said cannot be scored")
            if self.task.way == "choose":
                require(len(question.choices) > 1, "a choice needs two choices or more")
                require(all(map(str.strip, question.choices)), "one of its choices is empty")
            if self.task.way == "choose" or self.task.lists_choices:
                right_choice(question)
        except UserError as error:
            raise type(error)(f"{self.records.path}, record {number}: {error}") from None
        return question

    def lines(self, answering: Answering, numbers: Iterable[int]) -> Iterator[tuple[int, Line]]:
        """(number, line) as each record ends. Ranks that share the model ask together, whatever each has."""
        ways = {"generate": self._write, "choose": self._choose, "read": self._read}
        return ways[self.task.way](answering, numbers)

    def _turns(self, question: Question) -> Turns:
        return [("user", self.task.content(question, self.prompter.template is not None))]

    def _continuations(self, question: Question) -> list[str]:
        """Its choices; in a document, which has no turns, a space comes before them."""
        space = "" if self.prompter.template else " "
        return [space + choice for choice in question.choices]

    @contextmanager
    def _asking(self, question: Question) -> Iterator[None]:
        """Errors while prompts are made of it become Unasked."""
        try:
            if question.fault:
                raise UserError(question.fault)
            yield
        except UserError as error:
            raise Unasked(f"{self.records.path}, record {question.number}: {error}") from None

    def _nothing(self, error: Unasked) -> Line:
        return {**NOTHING[self.task.way], "error": str(error)}

    def _write(self, answering: Answering, numbers: Iterable[int]) -> Iterator[tuple[int, Line]]:
        lost = []

        def requests() -> Iterator[Request]:
            for number in numbers:
                try:
                    prompt = self.prompts(number)[0]
                except Unasked as error:
                    lost.append((number, self._nothing(error)))
                else:
                    yield Request(number, prompt, max_tokens=self.task.max_tokens, key=number)

        for event in answering.engine.answer(requests()):
            answer = event.answer
            if answer.ended:
                yield answer.request.key, {"prediction": answer.text.given.strip(), "ended": answer.ended}
        yield from lost

    def _choose(self, answering: Answering, numbers: Iterable[int]) -> Iterator[tuple[int, Line]]:
        return self._each(numbers, Reader(answering), self._weigh)

    def _read(self, answering: Answering, numbers: Iterable[int]) -> Iterator[tuple[int, Line]]:
        return self._each(numbers, Reader(answering), self._follow)

    def _each(
        self, numbers: Iterable[int], reader: Reader, work: Callable[[Reader, int], Line]
    ) -> Iterator[tuple[int, Line]]:
        for number in numbers:
            try:
                yield number, work(reader, number)
            except Unasked as error:
                yield number, self._nothing(error)
        reader.finish()

    def _weigh(self, reader: Reader, number: int) -> Line:
        question = self.question(number)
        with self._asking(question):
            found = reader.choices(self._turns(question), self._continuations(question))
        logprobs = [round(choice.logprob, DIGITS) for choice in found]
        return {"logprobs": logprobs, "tokens": [choice.tokens for choice in found]}

    def _follow(self, reader: Reader, number: int) -> Line:
        (prompt,) = self.prompts(number)
        logprobs = zip(reader.logprobs(prompt, 1), prompt.targets[1:], strict=True)
        read = [logprob for logprob, is_target in logprobs if is_target]
        return {"logprob": round(sum(read), DIGITS), "tokens": len(read)}
