"""``rotmole exec``: another program of this environment, with the method registered in it.

PEFT finds no methods by itself, so a program that loads an adapter must have imported rotmole. As a
module, ``python -m rotmole_cli.exec CMD ...``, this file imports it and becomes that program.
"""

from __future__ import annotations

import logging
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn


class ExecError(Exception):
    """There is no such program; the message says what to give."""

    exit_code = 2


_PYTHON = ("python", "python3", Path(sys.executable).name)


def execute(words: Sequence[str]) -> NoReturn:
    """Replace this process by a program that has imported rotmole.

    Args:
        words: of its command line: a console script, a file ending in .py, or -m and a module,
            then its arguments. A leading "python" is left out.

    Raises:
        ExecError: there is no such program, or it is not one of this Python.
    """
    words = list(words)
    if words[:1] and words[0] in _PYTHON:
        words = words[1:]
    program(words)  # raises while errors can still be told in one sentence
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "rotmole_cli.exec", *words])


def program(words: Sequence[str]) -> Callable[[], object]:
    """Return what runs the program; its arguments are those of `sys.argv`.

    Raises:
        ExecError: there is no such program, or it is not one of this Python.
    """
    if not words:
        raise ExecError("give a command after --, such as: rotmole exec -- lm_eval --help")
    name = words[0]
    if name == "-m":
        if len(words) < 2:
            raise ExecError("-m needs the name of a module.")
        if not _is_module(words[1]):
            raise ExecError(f"there is no module {words[1]!r} in {sys.executable}.")
        return lambda: runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    if name.startswith("-"):
        raise ExecError(
            f"{name} is an option of Python, which runs already; give a console script, a file "
            "ending in .py, or -m MODULE."
        )
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ExecError(f"there is no file {name}.")
        return lambda: _run_file(name)
    scripts = entry_points(group="console_scripts")
    for script in scripts:
        if script.name == name:
            return lambda: script.load()()
    if (found := shutil.which(name)) and _is_script(Path(found)):
        return lambda: _run_file(found)
    if found:
        raise ExecError(
            f"{found} is no Python program of this environment, so rotmole cannot be registered "
            "in it."
        )
    near = get_close_matches(name, {script.name for script in scripts}, n=1, cutoff=0.7)
    hint = f"; did you mean {near[0]!r}?" if near else "; install the package that brings it."
    raise ExecError(f"there is no command {name!r} in this environment{hint}")


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _is_script(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            first = stream.readline(500)
    except OSError:
        return False
    return first.startswith(b"#!") and b"python" in first


def _run_file(file: str) -> object:
    sys.path.insert(0, str(Path(file).resolve().parent))  # as Python does for a script
    return runpy.run_path(file, run_name="__main__")


def main() -> object:
    """Be the program that the arguments name."""
    words = sys.argv[1:]
    run = program(words)
    sys.argv = words[1:] if words[0] == "-m" else words
    if sys.path[:1] == [os.getcwd()] and words[0] != "-m":
        del sys.path[0]  # python -m has added it, a console script has not
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they report what the import looked for
    import rotmole  # noqa: F401 - it registers the method with PEFT

    return run()


if __name__ == "__main__":
    sys.exit(main())  # type: ignore[arg-type] # what a console script returns
