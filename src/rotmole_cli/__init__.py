"""Console entry point of rotmole: imports nothing heavy, so that help and version answer at once.

The verbs are declared in commands.py; what they do lives in rotmole/cli/, whose import brings PEFT
and so happens only when a verb runs. For the same reason this is a second top-level package.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after ``rotmole``; None takes them from the process.

    Returns:
        The exit code: 0 done, 1 unexpected, 2 bad input, 3 not finite, 4 storage, 130 Ctrl-C,
        143 SIGTERM.

    Source: our choice.
    """
    import sys

    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from rotmole_cli.run import run
    except ModuleNotFoundError as error:
        print(
            f"rotmole: the command line needs {error.name}: pip install 'rotmole[train]'",
            file=sys.stderr,
        )
        return 2
    return run(words)
