"""What the user can mend, in one line `error: ...`, and how to say it. Imports no torch.

docs/architecture.md has the tree of all errors, and who catches them.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can mend, reported in one line and without a traceback."""


class ConfigError(UserError, ValueError):
    """The user's configuration is wrong. One line: key, value, what is allowed, what to do."""


class CheckpointError(UserError):
    """A checkpoint was not written, on all ranks alike. One line: where, why, what is free, what to do."""


class DataError(UserError):
    """The data cannot carry the run. One line: which source, why, what to do."""


class StorageError(UserError):
    """Where the data lie does not answer, or has no room left. One line: what, why, what to do."""


class HangingRead(StorageError):
    """A read does not return. Nobody can end its thread, so the process ends without waiting for it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the closest known word, or all of them where none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def require(holds: bool, message: str) -> None:
    """Raises ConfigError with `message`, one line, unless `holds`."""
    if not holds:
        raise ConfigError(message)
