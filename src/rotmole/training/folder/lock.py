"""One run at a time in a run folder: a lock that the system drops when its process dies."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from rotmole.errors import InputError
from rotmole.files import atomic_write_text, make_folder, storage_errors

LOCK = "run.lock"
OWNER = "run.owner.json"


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run folder against other processes; it is created if missing.

    Raises:
        InputError: another process trains into it: which, where, since when.
        StorageError: the folder cannot be written.
    """
    is_new = not run_dir.exists()
    make_folder(run_dir)
    lock = FileLock(run_dir / LOCK, timeout=0)
    with storage_errors(run_dir / LOCK):
        try:
            lock.acquire()
        except Timeout:  # an OSError too
            raise InputError(
                f"output_dir {str(run_dir)!r} is in use by another run{_owner(run_dir)}; wait for "
                "it, stop it, or choose another output_dir."
            ) from None
    try:
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        atomic_write_text(run_dir / OWNER, json.dumps(owner))
        yield
    finally:
        for name in (OWNER, LOCK):  # still locked, so nobody else can be inside
            with suppress(OSError):
                (run_dir / name).unlink()
        lock.release()
        if is_new:  # and nothing was written
            with suppress(OSError):
                run_dir.rmdir()


def _owner(run_dir: Path) -> str:
    try:
        owner = json.loads((run_dir / OWNER).read_text(encoding="utf-8"))
        return f" (process {owner['pid']} on {owner['host']}, since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # between locking and writing
        return ""
