"""Every error that rotmole raises on purpose, and the exit code of the command line for it.

    RotMoleError                      exit 1
    ├── InputError (ValueError)       exit 2   bad input; raised before work starts if possible
    │   ├── ConfigError                        a run file or adapter configuration: every problem
    │   ├── DataError                          a data file: path, row number and snippet
    │   ├── ModelError                         a base model that cannot be loaded or adapted
    │   └── AdapterError                       an adapter folder that is broken or does not fit
    ├── NonFiniteError                exit 3   training stopped before a NaN reached the weights
    └── StorageError (OSError)        exit 4   a disk that is full, read-only or missing

Interrupted runs exit with 130 (Ctrl-C) or 143 (SIGTERM) after saving. If memory runs out, the exit
code is 1 and the message says what to change; docs/failures.md lists the causes of each error.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class RotMoleError(Exception):
    """Base class of everything rotmole raises on purpose."""

    exit_code = 1


class InputError(RotMoleError, ValueError):
    """The user's input is wrong; the message says what, the value, the rule and the fix."""

    exit_code = 2


class ConfigError(InputError):
    """One or more settings are wrong.

    Args:
        problems: one sentence per wrong setting; the message lists all of them.
        where: what was read, such as a file name.
    """

    def __init__(self, problems: Sequence[str] | str, where: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.where = where
        head = f"{where}: " if where else ""
        if len(self.problems) == 1:
            super().__init__(head + self.problems[0])
        else:
            lines = "".join(f"\n  - {problem}" for problem in self.problems)
            super().__init__(f"{head}{len(self.problems)} problems:{lines}")


class DataError(InputError):
    """Data is wrong; the message has the file, the row and a part of its text.

    Args:
        message: one sentence, or one for each fault of `faults`.
        source: the file or data set; "" if it is none.
        kind: what rows with the same fault have in common; the message if it is empty.
        faults: the single errors that this one says together.
    """

    def __init__(
        self, message: str, *, source: str = "", kind: str = "", faults: Sequence[DataError] = ()
    ) -> None:
        super().__init__(message)
        self.source, self.kind = source, kind or message
        self.faults = list(faults) or [self]


class ModelError(InputError):
    """A base model or tokenizer cannot be loaded, or cannot carry an adapter."""


class AdapterError(InputError):
    """A saved adapter is broken, or does not fit the model it is loaded into."""


class NonFiniteError(RotMoleError):
    """A loss or gradient is NaN or infinite; training stopped before the update."""

    exit_code = 3


class StorageError(RotMoleError, OSError):
    """The disk is full, read-only or missing."""

    exit_code = 4


def did_you_mean(word: object, known: Iterable[str], *, cutoff: float = 0.7) -> str:
    """Suggest the known word that is nearest to what the user wrote.

    Args:
        word: what the user wrote.
        known: the words that exist.
        cutoff: how alike two words must be, from 0 to 1.

    Returns:
        "; did you mean 'x'?", or the empty string if no word is near.

    >>> did_you_mean("rotaton", ["rotation", "router"])
    "; did you mean 'rotation'?"
    """
    nearest = difflib.get_close_matches(str(word), list(known), n=1, cutoff=cutoff)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def one_of(name: str, value: object, allowed: Iterable[str]) -> str:
    """Say that a setting's value is not one of the allowed words, and which word is nearest.

    Args:
        name: the setting's full name.
        value: what the user wrote.
        allowed: the allowed words; of more than twelve the first ten are listed.

    >>> one_of("split", "trian", ["train", "test"])
    "split is 'trian'; it must be one of train, test; did you mean 'train'?"
    """
    words = list(allowed)
    listed = [*words[:10], "..."] if len(words) > 12 else words
    return f"{name} is {value!r}; it must be one of {', '.join(listed)}{did_you_mean(value, words)}"
