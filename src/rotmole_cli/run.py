"""Run a command and turn any error into one sentence on stderr and an exit code."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import typer

from rotmole_cli.commands import app

_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
INTERRUPTED, TERMINATED = 130, 143
SHARED = ("train", "combine", "eval", "exec")  # whose work a launcher's processes share


class Terminated(BaseException):
    """SIGTERM arrived outside of training; training handles the signal itself."""


def run(words: Sequence[str]) -> int:
    """Run the command that the words name.

    Args:
        words: the words after ``rotmole``; ``--debug`` may stand anywhere before ``--``.

    Returns:
        The exit code. If the command runs in one process only, a launcher's other processes
        return 0 at once.
    """
    words, debug = _take_debug(list(words))
    if _rank() and not set(words[:1]) & set(SHARED):
        return 0  # the first process runs the command
    with warnings.catch_warnings(), _sigterm_raises():
        _prepare(debug)
        try:
            # not app(words): that would turn Ctrl-C and a closed pipe into bare exit codes
            command = typer.main.get_command(app)
            with command.make_context("rotmole", words) as context:
                result = command.invoke(context)
        except BaseException as error:  # everything ends as one sentence and an exit code
            if debug and not _is_usage(error):
                traceback.print_exc()
            return _explain(error, debug)
    return result if isinstance(result, int) else 0


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python allows it only there
        yield
        return
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _take_debug(words: list[str]) -> tuple[list[str], bool]:
    end = words.index("--") if "--" in words else len(words)
    others = [word for word in words[:end] if word != "--debug"]
    return others + words[end:], len(others) < end


def _prepare(debug: bool) -> None:
    """Set what holds for the whole process: the program may do that, the library may not."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if hasattr(
        sys.stdout, "reconfigure"
    ):  # show a letter's code if the terminal cannot show the letter
        sys.stdout.reconfigure(errors="backslashreplace")
    if not debug:
        # bitsandbytes reports at every 8-bit product that it computes in float16, and which faster
        # kernels it looked for
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        # torchao lists every kernel of other devices that it cannot load; torch reports its own
        # registrations
        logging.getLogger("torchao").setLevel(logging.ERROR)
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        if not _rank():  # only the first of a launcher's processes shows warnings
            warnings.filterwarnings("default", category=UserWarning)
        warnings.showwarning = _show_warning


def _rank() -> int:
    """Return the number of this process among those of a launcher such as torchrun."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"warning: {' '.join(str(message).split())}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _is_usage(error: BaseException) -> bool:
    return hasattr(error, "show") and hasattr(error, "exit_code")


def _explain(error: BaseException, debug: bool) -> int:  # noqa: PLR0911 - one return per kind
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        _say("rotmole: interrupted.")
        return INTERRUPTED
    if isinstance(error, Terminated):
        _say("rotmole: terminated.")
        return TERMINATED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if _is_usage(error):  # a wrong option or verb: the parser's own message
        error.show()
        return 2
    if isinstance(error, BrokenPipeError):  # the reader, such as head, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    text, code = _sentence(error, debug)
    rank = _rank()
    _say(f"rotmole: [rank {rank}] {text}" if rank else f"rotmole: {text}")
    return code


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()  # torch's CPU allocator raises a plain RuntimeError
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "out of memory" in text
    )


def _sentence(error: BaseException, debug: bool) -> tuple[str, int]:
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):  # rotmole's own errors
        return str(error), code
    if isinstance(error, ModuleNotFoundError):
        return f"this needs {error.name}: pip install 'rotmole[train]'.", 2
    if _is_out_of_memory(error):
        return (
            "out of memory; lower training.per_device_train_batch_size (and raise "
            "gradient_accumulation_steps) or training.max_length, set "
            "training.activation_checkpointing: true, or load the base with model.quantization; "
            "for eval lower evaluation.batch_size. `rotmole check` estimates what a run needs.",
            1,
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"the name {str(error.filename)[:40]!r}... is too long for a file; shorten it.", 2
    if isinstance(error, OSError) and error.errno in _STORAGE:
        return f"a file operation failed: {error}.", 4
    hint = "" if debug else " Run it again with --debug for the traceback."
    return f"unexpected {type(error).__name__}: {error}.{hint}", 1
