"""Answers to many prompts: a batch of fixed shape whose sequences are refilled as they end.

    admit    a prompt takes a free sequence of the cache: it is read in one call, which gives its first token
    step     every sequence that is not done sends its newest token, and gets the next

Few shapes in all: prompts padded to one of a few widths, and one token of each sequence. The host plans where
everything goes and asks the device for nothing but the tokens that were chosen. An answer depends only on its
request, with its own seed and number. Where ranks share the model, `agree` keeps them at the same calls.

Letters: B sequences, V words.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from torchtitan.components.tokenizer import Tokenizer
from torchtitan.generation.answer_text import AnswerText
from torchtitan.generation.kv_cache import KVCache
from torchtitan.generation.options import Sampling
from torchtitan.generation.sampling import SamplingRows, next_tokens, uniforms

DONE: Any = object()
NARROWEST = 64  # tokens that a short prompt is padded to
WIDER = 4  # times as many for the next; each width is compiled once


class Prompt(Protocol):
    """Tokens, and whatever else the model reads with them."""

    @property
    def ids(self) -> Sequence[int]:
        """The tokens, at least one."""

    @property
    def identity(self) -> Sequence[int]:
        """A number for each token, equal in two prompts where the model reads the same."""

    @property
    def rich(self) -> bool:
        """Whether it holds more than tokens."""

    def rest(self, start: int) -> "Prompt":
        """From token `start` on."""


class Forward(Protocol):
    """The model with its cache."""

    def __call__(
        self, tokens: Tensor, where: dict[str, Tensor], keep: Tensor, prompt: Any, rich: bool
    ) -> Tensor:
        """Logits [R, V] of token `keep[r]` of each row.

        tokens: int64 [R, Q]; where: KVCache.append; keep: int64 [R]. `prompt`: the one that is read, None for
        a step; rich: some rank's prompt holds more than tokens, so that all ranks run what reads it.
        """


@dataclass(frozen=True)
class Request:
    """What to answer, and how."""

    number: int  # of the sample: with the seed it decides every draw
    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    max_tokens: int = 256
    stops: tuple[str, ...] = ()
    key: int = 0  # the caller's own name for it


@dataclass
class Answer:
    """An answer so far; `ended` says why nothing more comes, once it is so."""

    request: Request
    text: AnswerText
    ids: list[int] = field(default_factory=list)  # without the token that ended it
    logprobs: list[float] = field(default_factory=list)  # natural, of each id, by the model itself
    ended: Literal["", "stop", "length"] = ""
    cancelled: bool = False  # nobody waits for it any more: it ends with its next token


@dataclass(frozen=True)
class Event:
    """A piece of text of an answer, empty where none is certain yet."""

    answer: Answer
    text: str


class Engine:
    """Answers requests in the order in which they come, as many at a time as the cache has rows."""

    def __init__(
        self,
        forward: Forward,
        cache: KVCache,
        tokenizer: Tokenizer,
        ends: Iterable[int],
        agree: Callable[[list[int]], list[int]] = lambda mine: mine,
        reuse: bool = False,
        columns: int = 1,
    ):
        """`ends`: ids after which nothing follows; `agree`: the largest of each number over the ranks that
        share the model; `reuse`: a prompt that begins as what a free sequence holds (the next turn of a
        conversation) is read from there on, which may change the last bits of its logits; `columns`: a call's
        are a multiple of it, where ranks divide them among each other.
        """
        self.forward = forward
        self.cache = cache
        self.tokenizer = tokenizer
        self.ends = frozenset(ends)
        self.agree = agree
        self.reuse = reuse
        self.columns = columns
        self.rows: list[_Row | None] = [None] * len(cache.lengths)
        self.read: list[list[int]] = [[] for _ in cache.lengths]  # identities of what each sequence holds

    def answer(self, requests: Iterable[Request | None]) -> Iterator[Event]:
        """Pieces of text as they become certain; the last of an answer has its `ended` set.

        A None among the requests says that none is there yet. Closing the iterator early leaves nothing
        behind.
        """
        try:
            yield from self._answer(requests)
        finally:
            for row in [row for row, held in enumerate(self.rows) if held is not None]:
                self.rows[row], self.read[row] = None, []

    @torch.no_grad()
    def _answer(self, requests: Iterable[Request | None]) -> Iterator[Event]:
        source, more = iter(requests), True
        while True:
            while True:
                request = next(source, DONE) if more and None in self.rows else None
                if request is DONE:
                    more, request = False, None
                row, start = self._place(request.prompt) if request else (0, 0)
                rest = request.prompt.rest(start) if request else None
                admitted, width, rich = self.agree(self._needs(rest))
                if not admitted:
                    break
                logits = self._read(row, start, rest, width, bool(rich))
                if request:
                    yield self._begin(row, request, logits)
            busy, goes_on = self.agree([sum(held is not None for held in self.rows), int(more)])
            if busy:
                yield from self._step()
            elif not goes_on:
                return

    def width(self, length: int) -> int:
        """Columns of a call that reads so many tokens."""
        width = NARROWEST
        while width < length:
            width *= WIDER
        width = min(width, max(self.cache.places, length))
        return -(-width // self.columns) * self.columns

    def _needs(self, prompt: Prompt | None) -> list[int]:
        """What one call needs: is there a prompt, how wide is it, does it hold more than tokens?"""
        return [1, self.width(len(prompt.ids)), int(prompt.rich)] if prompt else [0, 0, 0]

    def _place(self, prompt: Prompt) -> tuple[int, int]:
        """A free sequence, and how many tokens of the prompt it holds already."""
        free = [row for row, held in enumerate(self.rows) if held is None]
        if not self.reuse:
            return free[0], 0
        held = {row: min(common_prefix(self.read[row], prompt.identity), len(prompt.ids) - 1) for row in free}
        row = max(free, key=held.__getitem__)
        return row, held[row]

    def _read(self, row: int, start: int, prompt: Prompt | None, width: int, rich: bool) -> Tensor:
        """Logits [1, V] after a prompt from token `start` of a sequence; None: this rank only runs along."""
        ids = list(prompt.ids) if prompt else []
        if prompt:
            self.cache.crop(row, start)
            del self.read[row][start:]
        where = self.cache.append([row], [len(ids)], width)
        tokens = torch.tensor([ids + [self.tokenizer.pad_id] * (width - len(ids))])
        logits = self._logits(tokens, where, [max(len(ids) - 1, 0)], prompt, rich)
        if prompt:
            self.read[row] += prompt.identity  # now that it holds them
        return logits

    def _begin(self, row: int, request: Request, logits: Tensor) -> Event:
        held = self.rows[row] = _Row(request, self.tokenizer)
        return self._take(row, *self._choose(logits, [held])[0])

    def _step(self) -> Iterator[Event]:
        """One more token for every sequence that is being answered."""
        counts = [int(held is not None) for held in self.rows]
        where = self.cache.append(range(len(counts)), counts, self.columns)
        pad = self.tokenizer.pad_id
        newest = [held.answer.ids[-1] if held else pad for held in self.rows]
        tokens = torch.tensor([[id, *[pad] * (self.columns - 1)] for id in newest])
        logits = self._logits(tokens, where, [0] * len(counts), None, False)
        chosen = self._choose(logits, self.rows)
        yield from [self._take(row, *chosen[row]) for row in range(len(counts)) if counts[row]]

    def _logits(
        self, tokens: Tensor, where: dict[str, Tensor], keep: list[int], prompt: Any, rich: bool
    ) -> Tensor:
        return self.forward(self._put(tokens), where, self._put(torch.tensor(keep)), prompt, rich)

    def _put(self, values: Tensor) -> Tensor:
        return values.to(self.cache.device, non_blocking=True)

    def _choose(self, logits_RV: Tensor, held: Sequence["_Row | None"]) -> list[tuple[int, float]]:
        """The next token of each row with its log-probability, copied from the device."""
        options = SamplingRows([row.sampling if row else Sampling() for row in held], logits_RV.device)
        numbers = torch.tensor([row.uniform() if row else 0.0 for row in held], dtype=torch.float64)
        seen = self._put(_seen(held, logits_RV.shape[1])) if options.penalises else None
        ids = next_tokens(logits_RV, options, self._put(numbers), seen)
        logprobs = logits_RV.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
        both = torch.stack((ids.double(), logprobs.double())).tolist()  # one copy; float64 holds ids exactly
        return [(int(id), logprob) for id, logprob in zip(*both, strict=True)]

    def _take(self, row: int, id: int, logprob: float) -> Event:
        """One more token of a row; the row is free where the answer has ended."""
        held = self.rows[row]
        assert held is not None
        answer, text = held.answer, ""
        if id in self.ends:
            answer.ended = "stop"
        else:
            answer.ids.append(id)
            answer.logprobs.append(logprob)
            text = answer.text.add(id)
            full = (
                len(answer.ids) == answer.request.max_tokens or self.cache.lengths[row] == self.cache.places
            )
            answer.ended = "stop" if answer.text.stopped else "length" if full or answer.cancelled else ""
        if answer.ended:
            text += answer.text.finish()
            self.rows[row] = None
        return Event(answer, text)


class _Row:
    """A sequence that is being answered."""

    def __init__(self, request: Request, tokenizer: Tokenizer):
        self.answer = Answer(request, AnswerText(tokenizer, request.stops))
        self.sampling = request.sampling
        self.numbers = uniforms(request.seed, request.number, request.max_tokens)

    def uniform(self) -> float:
        """The number in [0, 1) of the next draw."""
        return float(self.numbers[len(self.answer.ids)])


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many numbers both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def _seen(held: Sequence[_Row | None], words: int) -> Tensor:
    """bool [R, V]: the words of each prompt and its answer so far."""
    seen_RV = torch.zeros(len(held), words, dtype=torch.bool)
    for row, sequence in enumerate(held):
        if sequence is not None:
            ids = [*sequence.answer.request.prompt.ids, *sequence.answer.ids]
            seen_RV[row, torch.tensor(ids)] = True
    return seen_RV
