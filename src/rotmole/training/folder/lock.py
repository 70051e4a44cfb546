"""One run at a time in a run folder: a lock that the system drops when its process dies."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from rotmole.errors import InputError
from rotmole.files import make_folder, storage_errors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment] # the module or nothing

logger = logging.getLogger(__name__)

LOCK = "run.lock"
_HELD: set[int] = set()
_WITHOUT_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)


def _let_go() -> None:
    """Close a parent's locks in a child it forked, which would hold them beyond its death."""
    for handle in _HELD:
        with suppress(OSError):
            os.close(handle)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)  # nothing else reaches workers of a dataloader


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run folder against other processes; it is created if missing.

    Args:
        run_dir: the run folder. Where its file system knows no locks, a warning is all there is.

    Raises:
        InputError: another process trains into it: which, where, since when.
        StorageError: the folder cannot be written.

    Source: our choice; flock(2), which ends with its process however that dies.
    """
    fresh = not run_dir.exists()
    make_folder(run_dir)
    path = run_dir / LOCK
    handle = _acquire(path)
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner and handle in _HELD:
            with suppress(OSError):
                path.unlink()  # still locked, so nobody else can be inside
            _HELD.discard(handle)
            os.close(handle)
            if fresh:  # and nothing was written
                with suppress(OSError):
                    run_dir.rmdir()


def _acquire(path: Path) -> int:
    while True:
        with storage_errors(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle, path)
            if os.fstat(handle).st_nlink == 0:  # its owner removed it before we had it
                os.close(handle)
                continue
            told = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
            with storage_errors(path):
                os.ftruncate(handle, 0)
                os.write(handle, json.dumps(told).encode())
        except BaseException:
            os.close(handle)
            raise
        _HELD.add(handle)
        return handle


def _lock(handle: int, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"output_dir {str(path.parent)!r} is in use by another run{_owner(handle)}; wait for "
            "it, stop it, or choose another output_dir."
        ) from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        logger.warning("%s: no locks on this file system; start one run at a time", path.parent)


def _owner(handle: int) -> str:
    try:
        told = json.loads(os.pread(handle, 4096, 0))
        return f" (process {told['pid']} on {told['host']}, since {told['since']})"
    except (ValueError, KeyError, TypeError):  # caught between locking and writing
        return ""


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
