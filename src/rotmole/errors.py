"""Every error that rotmole raises on purpose, and the exit code the command line gives it.

    RotMoleError                      exit 1
    ├── InputError (ValueError)       exit 2   bad input: said before work starts where it can be
    │   ├── ConfigError                        a run file or adapter configuration: every problem
    │   ├── DataError                          a data file: path, row number and snippet
    │   ├── ModelError                         a base model that cannot be loaded or adapted
    │   └── AdapterError                       an adapter folder that is broken or does not fit
    ├── NonFiniteError                exit 3   training stopped before a NaN reached the weights
    └── StorageError (OSError)        exit 4   a disk that is full, read-only or gone

Interrupted runs exit with 130 (Ctrl-C) or 143 (SIGTERM) after saving. Running out of memory exits
with 1 and advice; docs/failures.md lists what leads to which error.
"""

from __future__ import annotations

from collections.abc import Sequence


class RotMoleError(Exception):
    """Base class of everything rotmole raises on purpose."""

    exit_code = 1


class InputError(RotMoleError, ValueError):
    """The user's input is wrong; the message says what, the value, the rule and the fix."""

    exit_code = 2


class ConfigError(InputError):
    """One or more settings are wrong.

    Args:
        problems: one sentence per wrong setting; all of them are shown at once.
        where: what was being read, such as a file name.
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
    """A data source is wrong: names the file, the row and a snippet."""


class ModelError(InputError):
    """A base model or tokenizer cannot be loaded, or cannot carry an adapter."""


class AdapterError(InputError):
    """A saved adapter is broken, or does not fit the model it is loaded into."""


class NonFiniteError(RotMoleError):
    """Training met a NaN or an infinity and stopped before the update."""

    exit_code = 3


class StorageError(RotMoleError, OSError):
    """The disk refused: full, read-only or missing."""

    exit_code = 4
