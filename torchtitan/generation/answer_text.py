"""An answer's ids as text while it grows."""

from collections.abc import Sequence

from torchtitan.components.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what a character decodes to of which bytes are still to come


class AnswerText:
    """Releases text once it is certain: no half characters, nothing of a stop string, no special token.

    `stopped` says that a stop string was met; the answer ends before it. The spelling of a special token is
    one where that token is met.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        self.ids: list[int] = []
        self.given = ""
        self.stopped = False

    def add(self, id: int) -> str:
        """What is certain with one more token, beyond what was given before."""
        if id in self.tokenizer.hidden:
            self.stopped = self.tokenizer.hidden[id] in self.stops
            return self._give(self.tokenizer.decode(self.ids)) if self.stopped else ""
        self.ids.append(id)
        text = self.tokenizer.decode(self.ids)
        found = [at for at in map(text.find, self.stops) if at >= 0]
        if found:
            self.stopped = True
            return self._give(text[: min(found)])
        certain = text.rstrip(UNFINISHED)
        return self._give(certain[: len(certain) - self._waiting(certain)])

    def finish(self) -> str:
        """What was held back, now that no token follows."""
        return "" if self.stopped else self._give(self.tokenizer.decode(self.ids))

    def _waiting(self, text: str) -> int:
        """Characters at the end of `text` that may be the beginning of a stop string."""
        lengths = (
            length for stop in self.stops for length in range(1, len(stop)) if text.endswith(stop[:length])
        )
        return max(lengths, default=0)

    def _give(self, text: str) -> str:
        new, self.given = text[len(self.given) :], max(self.given, text, key=len)
        return new
