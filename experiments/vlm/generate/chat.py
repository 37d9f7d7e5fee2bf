"""A conversation in a terminal: its turns, and what a line beginning with / does to them."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from experiments.vlm.data.document import Picture
from experiments.vlm.generate.answering import Answering
from experiments.vlm.generate.prompt import Prompt, read_picture
from torchtitan.config.errors import UserError
from torchtitan.generation.engine import Request
from torchtitan.tools.signals import handled

SAVED = b'{\n "messages": ['  # how a saved conversation begins
HELP = """/image PATH   a picture for the next turn; several are shown in their order
/undo         forget the pictures that wait, or else the last turn and its answer
/save PATH    the conversation as JSON: messages, pictures by their paths
/clear        begin anew
/quit         leave (as does Ctrl-D); Ctrl-C ends an answer"""


@dataclass
class Chat:
    """`turns` end with an answer; `pictures` wait for the next question. A model without conversations gets
    each turn alone.
    """

    answering: Answering
    ask: Callable[[int, Prompt], Request]
    turns: list[tuple[str, list[str | Picture]]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    def say(self, text: str) -> Iterator[str]:
        """The pieces of the answer, which Ctrl-C ends. Raises UserError and keeps the turns as they were."""
        content: list[str | Picture] = [*self.pictures, *([text] if text else [])]
        turns = [*self.turns, ("user", content)]
        prompter = self.answering.prompter
        prompt = prompter.prompt(turns if prompter.template else turns[-1:])
        said, interrupted = "", False

        def interrupt(number: int, frame: FrameType | None) -> None:
            nonlocal interrupted
            interrupted = True

        with handled([signal.SIGINT], interrupt):
            for event in self.answering.engine.answer([self.ask(len(self.turns), prompt)]):
                event.answer.cancelled = interrupted
                said += event.text
                yield event.text
        self.turns, self.pictures = [*turns, ("assistant", [said])], []

    def command(self, line: str) -> str:
        """Do what a line with / asks for; returns what to print. Raises UserError."""
        name, _, argument = line.partition(" ")
        work = {"/image": self._image, "/undo": self._undo, "/save": self._save, "/clear": self._clear}.get(
            name
        )
        if name != "/help" and work is None:
            return f"{name}: no such command\n{HELP}"
        if name in ("/image", "/save") and not argument.strip():
            raise UserError(f"{name}: give a path behind it")
        return HELP if work is None else work(argument.strip())

    def _image(self, path: str) -> str:
        picture = read_picture(path, "/image")
        self.answering.prompter.prompt([("user", [*self.pictures, picture])])  # it can be read
        self.pictures.append(picture)
        return f"picture {len(self.pictures)}: {path}"

    def _undo(self, argument: str) -> str:
        if self.pictures:
            self.pictures = []
            return "no picture waits"
        if not self.turns:
            return "there is no turn"
        del self.turns[-2:]
        return f"turns that are left: {len(self.turns) // 2}"

    def _clear(self, argument: str) -> str:
        self.turns, self.pictures = [], []
        return "a new conversation"

    def _save(self, path: str) -> str:
        messages = [
            {"role": role, "content": [_item(part) for part in content]} for role, content in self.turns
        ]
        text = json.dumps({"messages": messages}, ensure_ascii=False, indent=1)
        file = Path(os.path.expanduser(path))
        try:
            if file.is_file() and not file.read_bytes().startswith(SAVED):
                raise UserError(f"/save {path}: is a file that is no conversation; give another name")
            # What was no text when it was typed is left as its JSON escape.
            file.write_bytes(text.encode(errors="backslashreplace"))
        except (OSError, ValueError) as error:
            raise UserError(f"/save {path}: {getattr(error, 'strerror', None) or error}") from None
        return f"{len(messages)} messages in {path}"


def _item(part: str | Picture) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "image": part.name}
