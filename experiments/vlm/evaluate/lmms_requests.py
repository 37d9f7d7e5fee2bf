"""Answers to lmms-eval's requests. Imports nothing of it: its requests are known by their `args`, in order

    simple  generate    context, generation_kwargs, doc_to_visual, (several rounds: doc_to_text,) document
            likelihood  context, continuation, doc_to_visual, document
    chat    generate    context, doc_to_messages, generation_kwargs, document

where a document is its number, its task and its split. A continuation may be a function of the document.
"""

import io
import itertools
import os
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image as PILImage
from tqdm import tqdm

from experiments.vlm.data.formats.record_shard import ImageValues
from experiments.vlm.data.rgb import Rgb
from experiments.vlm.evaluate.likelihood import Reader
from experiments.vlm.generate.answering import Answering
from experiments.vlm.generate.prompt import Turns
from experiments.vlm.generate.record import turns_of
from torchtitan.config.errors import UserError
from torchtitan.generation.engine import Request
from torchtitan.generation.options import Sampling
from torchtitan.tools.logging import warn_once

FEW_SHOT_DELIMITER = "\n\n"  # what lmms-eval puts in as `until` where a task says nothing
KNOWN = {
    "do_sample", "max_new_tokens", "min_p", "num_beams", "repetition_penalty", "seed", "temperature", "top_k",
    "top_p", "until",
}  # fmt: skip
Rounds = Generator[Turns, str, list[str]]  # yields what to ask, is sent the answer; returns all answers


@dataclass
class Talk:
    """One request, and how far it is."""

    key: int  # its place among the requests
    name: str  # of its document, for errors and draws
    rounds: Rounds
    options: Mapping[str, Any]  # generation_kwargs
    asked: int = 0
    said: list[str] | None = field(default=None)  # all answers, once it is over

    def ask(self) -> Turns:
        """The first question."""
        return next(self.rounds)

    def hear(self, text: str) -> Turns | None:
        """The next question; None where it is over."""
        try:
            return self.rounds.send(text)
        except StopIteration as end:
            self.said = end.value
            return None


class LmmsRequests:
    """Answers requests of one model; `documents` finds the document that a request names.

    Raises UserError that names the document. Ranks make the same calls, with requests of their own.
    """

    def __init__(
        self, answering: Answering, images: ImageValues, documents: Callable[[str, str, int], Any], chat: bool
    ):
        self.answering = answering
        self.images = images
        self.documents = documents
        self.chat = chat

    def said(self, requests: Sequence[Any], several: bool) -> list[list[str]]:
        """What the model said to each request, one text a round; one round unless `several`."""
        times: dict[str, int] = {}
        talks = []
        for key, request in enumerate(requests):
            name = _name(request.args)
            # a request is repeated where its answers are to be compared
            times[name] = times.get(name, -1) + 1
            options = request.args[2 if self.chat else 1] or {}
            talks.append(
                Talk(key, f"{name} {times[name]}".strip(), self._rounds(request.args, several), options)
            )
        places = self.answering.engine.cache.places
        for note in sorted({note for talk in talks for note in notes(talk.options, places)}):
            warn_once(note)
        self._run(talks)
        return [talk.said or [] for talk in talks]

    def _run(self, talks: list[Talk]) -> None:
        """Run all to their end. The next round of one is asked while others are answered."""
        left: deque[tuple[Talk, Turns | None]] = deque((talk, None) for talk in talks)
        bar = tqdm(total=len(talks), unit="request", disable=None)

        def requests() -> Iterator[Request | None]:
            while any(talk.said is None for talk in talks):
                yield self._request(*left.popleft()) if left else None

        for event in self.answering.engine.answer(requests()):
            if event.answer.ended:
                talk = talks[event.answer.request.key]
                turns = talk.hear(event.answer.text.given)
                if turns is not None:
                    left.append((talk, turns))
                bar.update(turns is None)
        bar.close()

    def _request(self, talk: Talk, turns: Turns | None) -> Request:
        number = zlib.crc32(f"{talk.name} {talk.asked}".encode())
        talk.asked += 1
        try:
            prompt = self.answering.prompter.prompt(turns if turns is not None else talk.ask())
            sampling, most, stops = answer_options(talk.options, self.answering.engine.cache.places)
        except UserError as error:
            raise UserError(f"{talk.name}: {error}") from None
        return Request(number, prompt, sampling, talk.options.get("seed", 0), most, stops, talk.key)

    def _rounds(self, args: Sequence[Any], several: bool) -> Rounds:
        if self.chat:
            return self._chat_rounds(self._document(args), args[1], several)
        return self._simple_rounds(self._document(args), args[0], args[2], args[3] if several else None)

    def _simple_rounds(self, document: Any, context: str, doc_to_visual: Any, doc_to_text: Any) -> Rounds:
        visuals, about = doc_to_visual(document), None
        said: list[str] = []
        for number in itertools.count(1):
            said = [*said, (yield self._question(context, visuals))]
            if doc_to_text is None:
                break
            visuals, context, over, said, about = doc_to_text(
                document, previous_output=said, round_idx=number, previous_round_info=about
            )
            if over:
                break
        return list(said)

    def _chat_rounds(self, document: Any, doc_to_messages: Any, several: bool) -> Rounds:
        messages, about = doc_to_messages(document), None
        said: list[str] = []
        for number in itertools.count(1):
            said = [*said, (yield self._messages(messages))]
            if not several:
                break
            messages, over, said, about = doc_to_messages(
                document, round_idx=number, previous_output=said, previous_round_info=about
            )
            if over:
                break
        return list(said)

    def losses(self, requests: Sequence[Any], by_token: bool) -> list[tuple[float, bool]]:
        """The negative log-probability of each continuation, and whether greedy decoding would give it.

        by_token: the mean over its tokens, as lmms-eval's own models have it; else the sum. Its metrics take
        the least loss as the choice.
        """
        reader, found = Reader(self.answering), []
        bar = tqdm(total=len(requests), unit="request", disable=None)
        for _, group in itertools.groupby(requests, lambda request: (request.args[0], _name(request.args))):
            alike = [request.args for request in group]
            try:
                likelihoods = reader.choices(
                    self._context(alike[0]), [self._continuation(args) for args in alike]
                )
            except UserError as error:
                raise UserError(f"{_name(alike[0])}: {error}") from None
            divisors = [choice.tokens if by_token else 1 for choice in likelihoods]
            found += [(-c.logprob / max(1, n), c.greedy) for c, n in zip(likelihoods, divisors, strict=True)]
            bar.update(len(alike))
        reader.finish()
        bar.close()
        return found

    def _context(self, args: Sequence[Any]) -> Turns:
        doc_to_visual = args[2] if len(args) > 2 else None  # the likelihood of a choice by itself
        return self._question(args[0], doc_to_visual(self._document(args)) if doc_to_visual else None)

    def _continuation(self, args: Sequence[Any]) -> str:
        text = args[1] if isinstance(args[1], str) else str(args[1](self._document(args)))
        # A chat template says where an answer begins: no further delimiter is due.
        return text.lstrip() if self.answering.prompter.template else text

    def _document(self, args: Sequence[Any]) -> Any:
        number, task, split = args[-3:]
        return self.documents(task, split, number)

    def _question(self, text: str, visuals: Any) -> Turns:
        """`<image>` in the text says where an image stands, else they come first, as in training data."""
        shown = [self._image(visual) for visual in _flat(visuals)]
        return turns_of({"prompt": text, "images": shown}, self.images)

    def _messages(self, messages: list[dict[str, Any]]) -> Turns:
        turns = []
        for message in messages:
            content = message["content"]
            if not isinstance(content, str):
                content = [self._item(item) for item in content]
            turns.append({"role": message["role"], "content": content})
        return turns_of({"messages": turns}, self.images)

    def _item(self, item: dict[str, Any]) -> dict[str, Any]:
        if item.get("type") != "image":
            return item
        return {"type": "image", "image": self._image(item.get("url", item.get("image")))}

    def _image(self, visual: Any) -> bytes | str:
        """What a record holds in place of an image: bytes, a path or an address."""
        if isinstance(visual, PILImage.Image):
            rgb, file = Rgb(visual), io.BytesIO()
            PILImage.fromarray(rgb.box((0, 0, rgb.width, rgb.height))).save(file, "bmp")
            return file.getvalue()
        if isinstance(visual, str):
            return visual if "://" in visual else os.path.abspath(visual)
        raise UserError(f"asks for {_kind(visual)}, and this model sees images alone")


def answer_options(kwargs: Mapping[str, Any], places: int) -> tuple[Sampling, int, tuple[str, ...]]:
    """How an answer is drawn, how long it may be, and what ends it. Raises UserError.

    places: tokens of prompt and answer together.
    """
    beams = kwargs.get("num_beams") or 1
    if beams > 1:
        raise UserError(f"num_beams = {beams}: there is no beam search; use --gen_kwargs num_beams=1")
    until = kwargs.get("until") or []
    stops = [until] if isinstance(until, str) else until
    most = int(kwargs.get("max_new_tokens") or places)
    return _sampling(kwargs), min(most, places), tuple(stop for stop in stops if stop != FEW_SHOT_DELIMITER)


def notes(kwargs: Mapping[str, Any], places: int) -> list[str]:
    """A line for each of a task's generation_kwargs that cannot be followed."""
    unknown = kwargs.keys() - KNOWN
    lines = [f"generation_kwargs.{name} = {kwargs[name]!r} changes nothing here" for name in unknown]
    if (kwargs.get("max_new_tokens") or 0) > places:
        lines.append(
            f"max_new_tokens = {kwargs['max_new_tokens']}: an answer ends earlier, where {places} tokens are "
            "full with its prompt; --model_args max_tokens=N makes room"
        )
    return lines


def _sampling(kwargs: Mapping[str, Any]) -> Sampling:
    """Greedy unless `do_sample` or, where it is not given, a temperature says otherwise."""
    temperature = kwargs.get("temperature")
    draws = kwargs.get("do_sample")
    if not (temperature if draws is None else draws):
        penalty = kwargs.get("repetition_penalty")
        return Sampling() if penalty is None else Sampling(repetition_penalty=float(penalty))
    names = ("top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    return Sampling(temperature=1.0 if temperature is None else float(temperature), **given)


def _name(args: Sequence[Any]) -> str:
    """The name of the document that a request asks about."""
    return f"{args[-2]}, document {args[-3]}" if len(args) > 2 else ""


def _flat(visuals: Any) -> list[Any]:
    if visuals is None:
        return []
    return list(visuals) if isinstance(visuals, list | tuple) else [visuals]


def _kind(visual: Any) -> str:
    kind = visual.get("type") if isinstance(visual, dict) else None
    return f"a {kind}" if kind else f"a {type(visual).__name__}"
