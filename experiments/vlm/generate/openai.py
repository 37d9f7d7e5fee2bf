"""Requests and answers in the form of OpenAI's chat completions, so that existing clients work.

Images come only as data URLs: a request reads no file and no address of this machine. Fields that are not
understood are refused, never skipped.
"""

import base64
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.vlm.data.document import Picture
from experiments.vlm.generate.prompt import Turns
from torchtitan.config.errors import UserError
from torchtitan.generation.engine import Answer, Event
from torchtitan.generation.options import Sampling

ROLES = ("system", "user", "assistant")
MOST_IMAGES = 64
MOST_STOPS = 4
DETAILS = (None, "auto", "high")  # of an image, which is always read as large as in training
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")
# What clients say about themselves: nothing here depends on it.
NOTES = ("model", "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")
NO_OP: dict[str, tuple[Any, ...]] = {  # fields it does not support -> values that ask for nothing
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}
NUMBERS: dict[str, tuple[type, float, float]] = {  # name: (type, least, most)
    "temperature": (float, 0, 10),
    "top_p": (float, 0, 1),
    "top_k": (int, 0, 1 << 30),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 1e-3, 1e3),
    "seed": (int, -(1 << 63), (1 << 63) - 1),
    "max_tokens": (int, 1, 1 << 20),
    "max_completion_tokens": (int, 1, 1 << 20),
}


@dataclass(frozen=True)
class Completion:
    """What a request asks for."""

    turns: Turns
    sampling: Sampling
    seed: int
    max_tokens: int
    stops: tuple[str, ...]
    stream: bool
    stream_usage: bool  # a last piece says how many tokens there were
    logprobs: bool

    @property
    def pictures(self) -> int:
        """How many there are."""
        return _pictures(self.turns)


def parse(body: bytes, max_tokens: int) -> Completion:
    """`max_tokens`: the most, and the default. Raises UserError that names the field."""
    try:
        fields = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is not JSON: {str(error)[:100]}") from None
    if not isinstance(fields, dict):
        raise UserError("the body is not an object")
    _require_known(fields)
    numbers = {name: _number(fields, name) for name in NUMBERS if fields.get(name) is not None}
    sampling = Sampling(**{"temperature": 1.0} | {k: v for k, v in numbers.items() if hasattr(Sampling, k)})
    most = numbers.get("max_completion_tokens", numbers.get("max_tokens", max_tokens))
    return Completion(
        turns=_turns(fields.get("messages")),
        sampling=sampling,
        seed=numbers.get("seed", time.time_ns() % (1 << 63)),
        max_tokens=min(most, max_tokens),
        stops=_stops(fields.get("stop")),
        stream=_flag(fields, "stream"),
        stream_usage=_stream_usage(fields.get("stream_options")),
        logprobs=_flag(fields, "logprobs"),
    )


def _require_known(fields: Mapping[str, Any]) -> None:
    known = {"messages", "stop", "stream", "stream_options", "logprobs", *NOTES, *NUMBERS, *NO_OP}
    for name, value in fields.items():
        if name not in known:
            raise UserError(f"{name[:60]}: this server knows no such field")
        if name in NO_OP and value is not None and value not in NO_OP[name]:
            possible = " or ".join(map(json.dumps, NO_OP[name]))
            raise UserError(f"{name}: must be {possible} here, or left out")


def _stream_usage(options: Any) -> bool:
    options = {} if options is None else options
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise UserError("stream_options: must be an object with include_usage, or nothing")
    return _flag(options, "include_usage")


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _number(fields: Mapping[str, Any], name: str) -> Any:
    value, (kind, least, most) = fields[name], NUMBERS[name]
    right = isinstance(value, int | kind) and not isinstance(value, bool)
    if not (right and least <= value <= most and math.isfinite(value)):
        what = "whole number" if kind is int else "number"
        raise UserError(f"{name}: must be a {what} from {least} to {most}")
    return kind(value)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if not (value is None or isinstance(value, bool)):
        raise UserError(f"{name}: must be true or false")
    return bool(value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    fine = (
        isinstance(stops, list) and len(stops) <= MOST_STOPS and all(isinstance(s, str) and s for s in stops)
    )
    if not fine:
        raise UserError(f"stop: must be a text or a list of at most {MOST_STOPS}")
    return tuple(stops)


def _turns(messages: Any) -> Turns:
    if not isinstance(messages, list) or not messages:
        raise UserError("messages: must be a list of messages")
    turns = [_turn(message, f"messages[{number}]") for number, message in enumerate(messages)]
    if _pictures(turns) > MOST_IMAGES:
        raise UserError(f"messages: {_pictures(turns)} images, more than {MOST_IMAGES}")
    if turns[-1][0] == "assistant":
        raise UserError("messages: the last one must not be the assistant's")
    return turns


def _pictures(turns: Turns) -> int:
    return sum(isinstance(part, Picture) for _, content in turns for part in content)


def _turn(message: Any, where: str) -> tuple[str, list[str | Picture]]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise UserError(f"{where}.role: must be one of {', '.join(ROLES)}")
    _require_no_more(message, ("role", "content", "name"), where)
    content = message.get("content")
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(items, list) or not items:
        raise UserError(f"{where}.content: must be a text or a list of items")
    return message["role"], [_part(item, f"{where}.content[{i}]") for i, item in enumerate(items)]


def _require_no_more(fields: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name, value in fields.items():
        if name not in known and value:  # clients send back what other servers left empty
            raise UserError(f"{where}.{name[:60]}: this server knows no such field")


def _part(item: Any, where: str) -> str | Picture:
    fields: dict[str, Any] = item if isinstance(item, dict) else {}
    kind = fields.get("type")
    if kind not in ("text", "image_url"):
        raise UserError(f"{where}: must be an item of type text or image_url")
    _require_no_more(fields, ("type", kind), where)
    held = fields.get(kind)
    if kind == "text":
        if not isinstance(held, str):
            raise UserError(f"{where}.text: must be a text")
        return held
    if isinstance(held, dict):
        _require_no_more(held, ("url", "detail"), f"{where}.image_url")
        if held.get("detail") not in DETAILS:
            raise UserError(f"{where}.image_url.detail: must be high or auto here, or left out")
    url = held.get("url") if isinstance(held, dict) else held
    mark = DATA_URL.match(url) if isinstance(url, str) else None
    if not isinstance(url, str) or mark is None:
        raise UserError(f"{where}.image_url: must be a data URL, data:image/...;base64,...")
    try:
        return Picture(base64.b64decode(url[mark.end() :], validate=True), where)
    except ValueError:  # binascii.Error is one
        raise UserError(f"{where}.image_url: is not base64") from None


def completion(id: str, model: str, answer: Answer, prompt_tokens: int, logprobs: bool) -> dict[str, Any]:
    """The whole answer as a completion."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text.given},
        "finish_reason": answer.ended,
    }
    if logprobs:
        choice["logprobs"] = {"content": _logprobs(answer)}
    usage = _usage(answer, prompt_tokens)
    return _object(id, model, "chat.completion") | {"choices": [choice], "usage": usage}


def chunks(
    id: str, model: str, events: Iterator[Event], prompt_tokens: int, asked: Completion
) -> Iterator[dict[str, Any]]:
    """The pieces of an answer as they come."""
    whole, sent = _object(id, model, "chat.completion.chunk"), 0
    delta: dict[str, str] = {"role": "assistant"}
    for event in events:
        answer = event.answer
        if event.text or answer.ended:
            delta |= {"content": event.text} if event.text else {}
            choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": answer.ended or None}
            if asked.logprobs:
                choice["logprobs"] = {"content": _logprobs(answer, sent)}
            yield whole | {"choices": [choice]}
            delta, sent = {}, len(answer.ids)
    if asked.stream_usage:
        yield whole | {"choices": [], "usage": _usage(answer, prompt_tokens)}


def _usage(answer: Answer, prompt_tokens: int) -> dict[str, int]:
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": len(answer.ids)}
    return counts | {"total_tokens": sum(counts.values())}


def _object(id: str, model: str, kind: str) -> dict[str, Any]:
    return {"id": id, "object": kind, "created": int(time.time()), "model": model}


def _logprobs(answer: Answer, first: int = 0) -> list[dict[str, Any]]:
    """From token `first` on."""
    decode = answer.text.tokenizer.decode
    pairs = zip(answer.ids[first:], answer.logprobs[first:], strict=True)
    return [{"token": decode([id]), "logprob": logprob, "top_logprobs": []} for id, logprob in pairs]


def failure(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error in the form of OpenAI's."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
