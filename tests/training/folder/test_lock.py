"""One run at a time: who is refused, and that a lock dies with its process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import rotmole
from rotmole.errors import InputError, StorageError
from rotmole.training.folder import lock
from rotmole.training.folder.lock import LOCK, run_lock

BARE = f"""
import os, sys, time, types
from pathlib import Path
sys.modules["rotmole"] = package = types.ModuleType("rotmole")  # not all that PEFT brings
package.__path__ = {list(rotmole.__path__)!r}
from rotmole.errors import InputError
from rotmole.training.lock import run_lock
"""
HOLD = """
with run_lock(Path(sys.argv[1])):
    if sys.argv[2] == "fork" and os.fork() == 0:  # a worker that outlives its parent
        os.write(1, b"worker %d\\n" % os.getpid())
        time.sleep(60)
        os._exit(0)
    os.write(1, b"locked\\n")
    time.sleep(60)
"""


def hold(folder: Path, how: str = "alone") -> tuple[subprocess.Popen, int | None]:
    process = subprocess.Popen(
        [sys.executable, "-c", BARE + HOLD, str(folder), how], stdout=subprocess.PIPE, text=True
    )
    worker = None
    for _ in range(2 if how == "fork" else 1):
        word, *number = process.stdout.readline().split()
        worker = int(number[0]) if word == "worker" else worker
    return process, worker


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path, how):
    process, worker = hold(tmp_path, how)
    try:
        with pytest.raises(InputError, match="in use by another run") as caught, run_lock(tmp_path):
            pass
        said = str(caught.value)
        assert f"process {process.pid} on {os.uname().nodename}, since 20" in said
        assert "\n" not in said
        process.kill()
        process.wait()
        with run_lock(tmp_path):
            assert re.search(rf'"pid": {os.getpid()},', (tmp_path / LOCK).read_text())
    finally:
        if worker:
            os.kill(worker, signal.SIGKILL)
        process.kill()
        process.communicate()
    assert not (tmp_path / LOCK).exists()


def test_two_runs_of_one_process_exclude_each_other_too(tmp_path):
    with run_lock(tmp_path), pytest.raises(InputError, match="in use"), run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        pass


def test_a_folder_in_which_nothing_was_written_does_not_stay(tmp_path):
    with run_lock(tmp_path / "a" / "run"):
        pass
    assert not (tmp_path / "a" / "run").exists()
    (tmp_path / "own").mkdir()
    with run_lock(tmp_path / "own"):
        pass
    assert (tmp_path / "own").is_dir()


def test_a_file_in_the_way_is_a_storage_error(tmp_path):
    (tmp_path / "run").write_text("x", encoding="utf-8")
    with pytest.raises(StorageError), run_lock(tmp_path / "run"):
        pass


def test_a_lock_on_a_file_that_its_owner_just_removed_is_none(tmp_path, monkeypatch):
    """Whoever opened the file before that would hold a lock that no newcomer sees."""
    real, calls = lock._lock, []

    def leave_first(handle: int, path: Path) -> None:
        if not calls:
            path.unlink()
        calls.append(handle)
        real(handle, path)

    monkeypatch.setattr(lock, "_lock", leave_first)
    with run_lock(tmp_path):
        assert (tmp_path / LOCK).is_file()
        with pytest.raises(InputError, match="in use"), run_lock(tmp_path):
            pass
    assert len(calls) == 3
