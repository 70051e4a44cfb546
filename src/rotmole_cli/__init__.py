"""The entry point of the command line; it imports nothing heavy, so --help answers at once.

commands.py declares the commands. What they do lives in rotmole/cli/, whose import brings PEFT and
therefore happens only when a command runs. For the same reason this is a second top-level package.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after ``rotmole``; None takes those of the process.

    Returns:
        The exit code: 0 done, 1 unexpected, 2 bad input, 3 not finite, 4 storage, 130 Ctrl-C,
        143 SIGTERM.
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
