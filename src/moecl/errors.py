"""The exceptions of moecl, all of them.

    MoECLError                 exit code 1; the base of all
      UserError (ValueError)   exit code 2; something the user can fix
        ConfigError            a key or value of a stream file, or of --set
        DataError              a data file or one of its rows
        TaskError              a task's name: unknown, used twice, unusable
        BaseError              the base model: unsupported FFN, quantised, spread over devices, another than the store's
        StoreError             a store: missing, damaged, of another format version
        BusyError              locked by another process (says which: pid, host, since)
        RunError               a run folder: changed stream, not a run, unwritable, disk full
        AssetError             an asset: unknown, cannot be fetched, wrong digest, offline
        TrainingError          training cannot go on (the loss is NaN): task, step, remedy

Every message is one line that names the field, the file and line or row, the value, and what to do.
"""

import difflib
from collections.abc import Iterable


class MoECLError(Exception):
    """Base of every error raised on purpose; line breaks in `message` are folded, so that it prints as one line."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


class UserError(MoECLError, ValueError):
    """Something the user can fix."""

    exit_code = 2


class ConfigError(UserError):
    """A key or value of a stream file, or of --set."""


class DataError(UserError):
    """A data file or one of its rows."""


class TaskError(UserError):
    """A task's name: unknown, used twice or unusable."""


class BaseError(UserError):
    """The base model: unsupported, quantised, spread over devices, or not the one the store was made with."""


class StoreError(UserError):
    """A store: missing, damaged or of another format version."""


class BusyError(UserError):
    """Locked by another process."""


class RunError(UserError):
    """A run folder: changed stream, not a run, unwritable, disk full."""


class AssetError(UserError):
    """An asset: unknown, cannot be fetched, wrong digest, offline."""


class TrainingError(UserError):
    """Training cannot go on."""


def near(word: str, choices: Iterable[str]) -> str:
    """A suggestion to append to a message, or "" where no choice is close; case is ignored.

    >>> near("epoch", ["epochs", "lr"])
    " (did you mean 'epochs'?)"
    >>> near("zebra", ["epochs", "lr"])
    ''
    """
    by_folded = {choice.casefold(): choice for choice in choices}
    found = difflib.get_close_matches(word.casefold(), by_folded, n=1)
    return f" (did you mean {by_folded[found[0]]!r}?)" if found else ""
