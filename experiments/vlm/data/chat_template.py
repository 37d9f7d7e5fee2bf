"""A conversation to the parts of a document, with loss on what the assistant says, its end of turn included.

    [Turn("user", ["What is ", IMAGE, "?"]), Turn("assistant", ["A cat."])]
    ->  Special(BOS)
        Special(<|im_start|>) Text("user\\nWhat is ") IMAGE Text("?") Special(<|im_end|>) Text("\\n")
        Special(<|im_start|>) Text("assistant\\n") Text("A cat.", loss) Special(<|im_end|>, loss) Text("\\n")

Encoded piece by piece (sample.encode_text) this gives the ids that transformers gives for the rendered
string, and its mask: a conversation begins and ends as its template writes it. What differs on purpose:
contents that spell a control token stay text. The templates that are built in, and files that say nothing of
special tokens, write the bos and eos of the model's own tokenizer.

Where the template has no `{% generation %}` blocks, an answer is found by rendering the conversation once
more with a character in its place: what differs between the two is the answer, whatever the template does to
it (trimming, hiding earlier thoughts). Its end of turn is the control token right behind it.
"""

import functools
import os.path
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from experiments.vlm.data.built_in_templates import BUILT_IN
from experiments.vlm.data.document import BOS, EOS, Draft, ImageValue, Special, Text, Turn
from experiments.vlm.data.jinja_template import (
    GENERATION_END,
    GENERATION_START,
    TemplateFile,
    compile_template,
    read_template,
)
from experiments.vlm.data.rejects import Rejected
from torchtitan.components.tokenizer import Tokenizer
from torchtitan.config.errors import ConfigError

IMAGE, PROBE = "\U000f0002", "\U000f0003"
# What templates write for the tokenizer's own tokens, where no file next to them names any.
OWN = {"bos_token": "\U000f0004", "eos_token": "\U000f0005"}
OWN_SPELLINGS = {OWN["bos_token"]: BOS, OWN["eos_token"]: EOS}
ESCAPED = 0xF1000  # the first of the characters that stand for what must not be taken for a token
PRIVATE = "[\U000f0000-\U0010ffff]"


@functools.cache
def load_chat_template(name: str) -> "ChatTemplate":
    """A key of BUILT_IN, or a file: Jinja, or a tokenizer_config.json. Raises ConfigError."""
    file = BUILT_IN.get(name) or read_template(Path(os.path.expanduser(name)))
    try:
        return ChatTemplate(file)
    except jinja2.TemplateError as error:
        raise ConfigError(f"chat_template = {name}: {error}") from error


def ends_of(tokenizer: Tokenizer, template: "ChatTemplate | None") -> list[int]:
    """Ids after which an answer is over: a document's end, and what the template writes behind an answer."""
    ends = [tokenizer.eos_id]
    if template is not None:
        parts = template.render([Turn("user", ["A"]), Turn("assistant", ["A"])])
        marks = [part.spelling for part in parts if isinstance(part, Special) and part.loss]
        ends += [id for mark in marks[:1] if (id := tokenizer.special_id(mark)) is not None]
    return list(dict.fromkeys(ends))


class ChatTemplate:
    """Raises jinja2.TemplateError where the template cannot be compiled, or shows no user's message."""

    def __init__(self, file: TemplateFile):
        self.file = file
        self._template = compile_template(file.source)
        self._variables = file.variables or {**OWN, "image_token": IMAGE}
        self._marks_answers = bool(re.search(r"\{%-?\s*generation\s*-?%\}", file.source))
        self.takes_text = file.answers_alone or self._shows(PROBE)
        self._takes_items = self._shows([{"type": "text", "text": PROBE}])
        if not (self.takes_text or self._takes_items):
            raise jinja2.TemplateError("it does not show the content of a user's message")
        control = (*file.control, *OWN_SPELLINGS)
        self.markup = self._find_markup(_pattern(control))
        self._control = _pattern((*control, *([self.markup] if self.markup else [])))
        self.lead = self._find_lead()

    def speak(self, draft: Draft) -> Draft:
        """The draft of a conversation with its parts; another as it is. Raises Rejected as `render` does."""
        return replace(draft, parts=self.render(draft.turns)) if draft.turns else draft

    def render(self, turns: Sequence[Turn], prompt: bool = False) -> list[Text | Special | ImageValue]:
        """The parts, images in their places. Raises Rejected("chat_template") where the template refuses.

        prompt: the assistant is to speak next; with its answer these are the parts of the conversation.
        """
        spellings: list[str] = []
        try:
            messages = [self._message(turn, spellings) for turn in turns]
            rendered = self._render(messages, prompt)
            if not (self._marks_answers or prompt):
                rendered = self._mark_answers(messages, rendered)
        except Exception as error:  # a template may fail in any way
            raise Rejected("chat_template", f"{type(error).__name__}: {error}"[:300]) from error
        if self.markup:
            rendered = rendered.replace(self.markup, IMAGE)
        images = [part for turn in turns for part in turn.content if isinstance(part, ImageValue)]
        if rendered.count(IMAGE) != len(images):
            raise Rejected("chat_template", f"it shows {rendered.count(IMAGE)} of {len(images)} images")
        return self._parts(rendered, images, spellings)

    def _parts(
        self, rendered: str, images: Sequence[ImageValue], spellings: list[str]
    ) -> list[Text | Special | ImageValue]:
        parts: list[Text | Special | ImageValue] = []
        waiting = iter(images)
        loss = False
        for piece in re.split(
            f"([{IMAGE}{GENERATION_START}{GENERATION_END}]|{self._control.pattern})", rendered
        ):
            if piece in (GENERATION_START, GENERATION_END):
                loss = piece == GENERATION_START
            elif piece == IMAGE:
                parts.append(next(waiting))
            elif self._control.fullmatch(piece):
                parts.append(Special(OWN_SPELLINGS.get(piece, piece), loss))
            elif piece:
                parts.append(Text(_unescape(piece, spellings), loss))
        return parts

    def _message(self, turn: Turn, spellings: list[str]) -> dict[str, Any]:
        """For the template. What is spelled like a token becomes one character; `spellings` keeps it."""
        content = [
            part if isinstance(part, ImageValue) else _escape(part, self._control, spellings)
            for part in turn.content
        ]
        has_image = any(isinstance(part, ImageValue) for part in content)
        if has_image and self.markup:
            items = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in content
            ]
            return {"role": turn.role, "content": items}
        text = "".join(part if isinstance(part, str) else IMAGE for part in content)
        return {"role": turn.role, "content": self._plain(text)}

    def _plain(self, text: str) -> str | list[dict[str, str]]:
        return text if self.takes_text else [{"type": "text", "text": text}]

    def _render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        return self._template.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **self._variables
        )

    def _mark_answers(self, messages: list[dict[str, Any]], rendered: str) -> str:
        """Put the marks of generation around each answer and its end of turn."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                probe = {**message, "content": self._plain(PROBE)}
                probing = [*messages[:number], probe, *messages[number + 1 :]]
                start, end = _difference(rendered, self._render(probing))
                following = re.compile(f" ?(?:{self._control.pattern})").match(rendered, end)
                spans.append((start, following.end() if following else end))
        for start, end in reversed(spans):
            answer = f"{GENERATION_START}{rendered[start:end]}{GENERATION_END}"
            rendered = f"{rendered[:start]}{answer}{rendered[end:]}"
        return rendered

    def _shows(self, content: Any) -> bool:
        """Whether the template takes contents of this type: a string, or a list of typed items."""
        try:
            rendered = self._probe(content)
        except Exception:  # a template may fail in any way
            return False
        return PROBE in rendered and "'type'" not in rendered

    def _probe(self, content: Any) -> str:
        answer = "A" if isinstance(content, str) else [{"type": "text", "text": "A"}]
        return self._render([{"role": "user", "content": content}, {"role": "assistant", "content": answer}])

    def _find_lead(self) -> str:
        """The space that the template writes between a prompt and its answer, which the model writes itself
        where the prompt ends before it: Vicuna's. Empty in most.
        """
        asked = {"role": "user", "content": self._plain("A")}
        try:
            prompt = self._render([asked], prompt=True)
            whole = self._render([asked, {"role": "assistant", "content": self._plain(PROBE)}])
        except Exception:  # a template may fail in any way
            return ""
        lead = whole.replace(GENERATION_START, "").partition(PROBE)[0].removeprefix(prompt)
        return lead if lead.isspace() else ""

    def _find_markup(self, control: re.Pattern[str]) -> str:
        """What the template writes for an image, from its first control token to its last: our own marks of
        an image stand for it.

        Empty where it takes no typed items or writes nothing, or not the same for each image; then images are
        put where they stand in the content.
        """
        text = {"type": "text", "text": PROBE}
        if not (self._takes_items and self._shows([{"type": "image"}, text])):
            return ""
        none, one, two = (
            self._probe([{"type": "image"}] * count + [text]).partition(PROBE)[0] for count in range(3)
        )
        written = one.removeprefix(none)
        tokens = list(control.finditer(written))
        markup = written[tokens[0].start() : tokens[-1].end()] if tokens else written.strip()
        return markup if markup and two.removeprefix(none).count(markup) == 2 else ""


def _pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    """Any of the tokens, the longest first; nothing where there are none."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)")


def _escape(text: str, tokens: re.Pattern[str], spellings: list[str]) -> str:
    def keep(match: re.Match[str]) -> str:
        spellings.append(match[0])
        return chr(ESCAPED + len(spellings) - 1)

    return re.sub(f"{PRIVATE}|{tokens.pattern}", keep, text)


def _unescape(text: str, spellings: list[str]) -> str:
    return re.sub(PRIVATE, lambda match: spellings[ord(match[0]) - ESCAPED], text)


def _difference(text: str, other: str) -> tuple[int, int]:
    """The part [start, end) of `text` that `other` replaces by something with PROBE in it."""
    start = len(os.path.commonprefix([text, other]))
    same = len(os.path.commonprefix([text[start:][::-1], other[start:][::-1]]))
    end = len(text) - same
    if PROBE not in other[start : len(other) - same]:
        raise ValueError("it hides an answer")
    return start, end
