"""Every cross-check of a job that knows nothing of images."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """The user's configuration is wrong. One line: key, value, what is allowed, what to do."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the closest known word, or all of them where none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
