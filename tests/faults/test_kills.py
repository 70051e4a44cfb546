"""kill -9 while a checkpoint is written: the run goes on as if nothing had been.

Children of the warm parent die at a chosen write (half done), fsync, rename or removal below the
run's checkpoints, or at a random moment. What the disk would lose with the power is another
matter: there the order of the system calls is checked, which is all a program can do.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from rotmole.training.callbacks.metrics import TIMING_SUFFIXES, read_metrics
from rotmole.training.checkpoints.find import checkpoints
from rotmole.training.checkpoints.seal import COMPLETE, faults, step_of
from rotmole.training.folder.layout import is_being_cleared, is_finished
from training_cases import settings, write_data, write_model

pytestmark = pytest.mark.slow

AIM = "import ctypes; ctypes.CDLL(None).kill_at({below!r}.encode(), {at}, {notes!r}.encode())"
TIMER = """
import os, threading, time
def strike():
    while not os.path.exists({log!r}) or open({log!r}, "rb").read().count(b"\\n") < {lines}:
        time.sleep(0.001)
    time.sleep({after})
    os.kill(os.getpid(), 9)
threading.Thread(target=strike, daemon=True).start()
"""


@dataclass
class Killed:
    """The killed run's folder, and the run that nobody disturbed."""

    folder: Path
    between: bool  # it died after a checkpoint's first byte and before its COMPLETE.json


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory) -> Path:
    """Six updates, a checkpoint after every second, one of them kept beside the best."""
    root = tmp_path_factory.mktemp("kills")
    (root / "data").mkdir()
    content = settings(
        write_model(root / "model"), write_data(root / "data"), root / "run",
        max_steps=6, save_steps=2, eval_steps=2, save_total_limit=1, logging_steps=4,
    )  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return root / "run.yaml"


@pytest.fixture(scope="module")
def straight(warm, run_yaml) -> tuple[Path, list[str]]:
    """The undisturbed run: its folder, the events below its checkpoints."""
    folder, notes = run_yaml.with_name("straight"), run_yaml.with_name("notes")
    code = start(warm, run_yaml, folder, AIM.format(
        below=f"{folder}/checkpoint-", at=0, notes=str(notes)
    ))  # fmt: skip
    assert code == 0, run_yaml.with_name("err").read_text(encoding="utf-8")
    events = notes.read_text(encoding="utf-8").replace(f"{folder}/", "").splitlines()
    return folder, events


def start(warm, run_yaml: Path, folder: Path, before: str, *words: str) -> int:
    out, err = run_yaml.with_name("out"), run_yaml.with_name("err")
    given = ["train", str(run_yaml), f"output_dir={folder}", *words]
    return warm.ask(
        words=given, folder=str(run_yaml.parent), out=str(out), err=str(err), env={}, before=before
    )


def comparable(folder: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if not name.endswith(TIMING_SUFFIXES)}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.fixture
def killed(warm, run_yaml, straight, tmp_path) -> Callable[[str], Killed]:
    """A function that kills one run, looks at what is left, resumes it, compares the two."""

    def kill(before: str) -> Killed:
        folder = tmp_path / "run"
        log = str(folder / "metrics.jsonl")
        aim = before.format(below=f"{folder}/checkpoint-", notes=str(tmp_path / "notes"), log=log)
        assert start(warm, run_yaml, folder, aim) == -signal.SIGKILL
        whole = [path for path in checkpoints(folder) if (path / COMPLETE).exists()]
        assert [faults(path) for path in whole] == [[] for _ in whole]
        newest = step_of(whole[-1]) if whole else 0
        half = [
            path for path in checkpoints(folder)
            if step_of(path) > newest and any(f.stat().st_size for f in path.iterdir())
        ]  # fmt: skip
        code = start(warm, run_yaml, folder, "", "--resume", "auto")
        said = run_yaml.with_name("err").read_text(encoding="utf-8")
        assert code == 0, said
        for path in half:
            assert f"{path}: {COMPLETE} is missing, so it was never finished" in said
        done = newest == 6  # nothing was left to do but to write the result: no closing line
        rows = [[r for r in comparable(f) if not (done and "train_loss" in r)]
                for f in (folder, straight[0])]  # fmt: skip
        assert rows[0] == rows[1]
        weights = [f / "adapter" / "adapter_model.safetensors" for f in (folder, straight[0])]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert {p.name for p in checkpoints(folder)} == {p.name for p in checkpoints(straight[0])}
        return Killed(folder, bool(half))

    return kill


def position(events: list[str], event: str) -> int:
    """Number of the first such event, from 1."""
    return events.index(event) + 1


def test_every_file_is_on_the_disk_before_complete_and_that_before_anything_goes(straight):
    folder, events = straight
    sealed = position(events, f"rename checkpoint-4/{COMPLETE}")
    listed = json.loads((folder / "checkpoint-6" / COMPLETE).read_text(encoding="utf-8"))["files"]
    for name in listed:
        file = f"checkpoint-4/{name}"
        last_write = max(
            (i for i, e in enumerate(events, 1) if e in (f"write {file}", f"rename {file}")),
            default=0,  # safetensors renames by a call of its own
        )
        flushed = max(i for i, e in enumerate(events, 1) if e == f"fsync {file}")
        assert last_write < flushed < sealed, name
    temporary = [e for e in events[:sealed] if e.startswith(f"fsync checkpoint-4/.{COMPLETE}")]
    assert len(temporary) == 1
    on_disk = events.index("fsync checkpoint-4", sealed) + 1
    gone = [
        i
        for i, e in enumerate(events, 1)
        if e.startswith("unlink checkpoint-2/") and not e.endswith("/.saving")
    ]
    assert gone[0] > on_disk > sealed
    assert events[gone[0] - 1] == f"unlink checkpoint-2/{COMPLETE}"


def test_two_deaths(killed, straight):
    """In the middle of a byte stream, and while pruning; twenty are in the heavy lane."""
    events = straight[1]
    points = [
        position(events, "write checkpoint-4/optimizer.pt"),
        position(events, f"unlink checkpoint-2/{COMPLETE}") + 2,
    ]
    found = []
    for number, point in enumerate(points):
        died = killed(AIM.replace("{at}", str(point)))
        found.append(died.between)
        died.folder.rename(died.folder.with_name(f"run-{number}"))
    assert found[0]


@pytest.fixture
def replaced(warm, run_yaml, straight, tmp_path) -> Callable[[int], list[str]]:
    """A function that trains a finished run again and kills it at an event in its folder."""

    def replace(at: int) -> list[str]:
        folder, notes = tmp_path / f"run-{at}", tmp_path / f"notes-{at}"
        shutil.copytree(straight[0], folder)
        whole = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        aim = AIM.format(below=f"{folder}/", at=at, notes=str(notes))
        code = start(warm, run_yaml, folder, aim)
        assert code == (-signal.SIGKILL if at else 0)
        complete = [
            place for place in (folder, folder / "previous")
            if is_finished(place) and (place / "run.yaml").is_file() and (place / "manifest.json")
            .is_file() and not any(map(faults, checkpoints(place)))
            and (place / "adapter" / "adapter_model.safetensors").read_bytes() == whole
        ]  # fmt: skip
        assert complete, sorted(path.name for path in folder.iterdir())
        if at:
            unfinished = any(not faults(path) for path in checkpoints(folder)) and not (
                is_finished(folder)
            )
            more = ["--resume", "auto"] if unfinished and not is_being_cleared(folder) else []
            assert start(warm, run_yaml, folder, "", *more) == 0
        assert is_finished(folder)
        assert not (folder / "previous").exists()
        assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == whole
        return notes.read_text(encoding="utf-8").replace(f"{folder}/", "").splitlines()

    return replace


def test_a_finished_run_that_is_trained_again_is_never_lost(replaced):
    """Killed while it is set aside, and while its files go; more points are in the heavy lane."""
    events = replaced(0)
    gone = [i for i, e in enumerate(events, 1) if e.startswith("unlink adapter/")]
    for at in (position(events, "rename previous"), gone[1]):
        replaced(at)


@pytest.mark.heavy
def test_a_finished_run_is_never_lost_wherever_its_successor_dies(replaced):
    events = replaced(0)
    linked = next(i for i, e in enumerate(events, 1) if e.startswith("link "))
    last = max(i for i, e in enumerate(events, 1) if e.startswith("unlink .previous-"))
    cleared = position(events, "rename run.yaml")
    points = {round(linked + i * (cleared - linked) / 10) for i in range(11)}
    points |= {round(cleared + i * (last - cleared) / 6) for i in range(7)}
    for at in sorted(points):
        replaced(at)


@pytest.mark.heavy
def test_twenty_deaths(killed, straight):
    """14 at events spread over those of the second and third checkpoint, 6 at random moments."""
    events = straight[1]
    chance = random.Random(19)
    first = position(events, "mkdir checkpoint-4")
    points = [first + round(i * (len(events) - first) / 12) for i in range(13)]
    points.append(position(events, f"rename checkpoint-4/{COMPLETE}"))
    assert {events[point - 1].split()[0] for point in points} >= {"write", "fsync", "rename"}
    aims = [AIM.replace("{at}", str(point)) for point in points]
    for _ in range(6):
        lines, after = str(chance.randint(2, 4)), f"{chance.uniform(0, 0.06):.4f}"
        aims.append(TIMER.replace("{lines}", lines).replace("{after}", after))
    between = 0
    for number, aim in enumerate(aims):
        died = killed(aim)
        between += died.between
        died.folder.rename(died.folder.with_name(f"run-{number}"))
    assert len(aims) == 20
    assert between >= 10, f"only {between} of 20 fell inside the writing of a checkpoint"
