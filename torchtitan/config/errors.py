"""The tree of errors, and the base of it that every room shares. Imports no torch.

    Exception
      UserError          the user can mend it: one line `error: ...`, exit code 2, no traceback
        ConfigError      an option is wrong, or a file or folder that one names
          Damaged        a complete checkpoint that cannot be read (components/checkpoint_folder.py)
        CheckpointError  a checkpoint was not written: no space, no permission
        DataError        the data cannot carry the run: too much of it is bad, or nothing good is left
        StorageError     where the data lie does not answer for too long, or is full
      Rejected         a sample, image or shard is not used: counted by reason, logged, skipped
                       (experiments/vlm/data/rejects.py)
        Failed         an address was not fetched, and whether to try again (vlm/data/storage/client.py)
      StopAsked        a signal came while the storage was away: the trainer saves and ends (tools/signals.py)
      Stopped          somebody asked for a stop: unwinds to where work is saved (vlm/data/storage/client.py)
      RuntimeError
        Crashed        the working process of `prepare` died: one line, exit code 1; the same command goes on
                       (vlm/prepare/start.py)

A UserError ends a run. Rejected, Failed and Stopped never reach the user: the code that works on samples,
addresses or shards catches them. Everything else is a mistake of ours and keeps its traceback.
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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the closest known word, or all of them where none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def require(holds: bool, message: str) -> None:
    """Raises ConfigError with `message`, one line, unless `holds`."""
    if not holds:
        raise ConfigError(message)
