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
from rotmole.training.folder.lock import LOCK, OWNER, run_lock

BARE = f"""
import os, sys, time, types
from pathlib import Path
sys.modules["rotmole"] = package = types.ModuleType("rotmole")  # not all that PEFT brings
package.__path__ = {list(rotmole.__path__)!r}
from rotmole.errors import InputError
from rotmole.training.folder.lock import run_lock
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
            assert re.search(rf'"pid": {os.getpid()},', (tmp_path / OWNER).read_text())
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


HAMMER = """
import time
folder, runs = Path(sys.argv[1]), 0
end = time.monotonic() + 3
while time.monotonic() < end:
    try:
        with run_lock(folder):
            with open(folder / "inside", "x"):  # fails if another process is inside
                pass
            (folder / "inside").unlink()
            runs += 1
    except InputError:
        pass
print(runs)
"""


@pytest.mark.slow
def test_processes_that_come_and_go_are_never_inside_together(tmp_path):
    """The lock's file is removed while others open it."""
    words = [sys.executable, "-c", BARE + HAMMER, str(tmp_path)]
    processes = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    ended = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], [err for _, err in ended]
    assert sum(int(out) for out, _ in ended) > 3
