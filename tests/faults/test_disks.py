"""Disks that are full, read-only or too small: exit 4, the old checkpoint stays, nothing is half.

Tests may run as root, whom no permission stops, so each disk is a small file system of its own,
mounted where only the command's process sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rotmole.training.callbacks.metrics import read_metrics
from rotmole.training.checkpoints.find import checkpoints
from rotmole.training.checkpoints.seal import COMPLETE, faults
from training_cases import settings, write_data, write_model

MOUNT = """
import ctypes, os
libc, folder = ctypes.CDLL(None, use_errno=True), {folder!r}.encode()
user, group = os.getuid(), os.getgid()
NEWNS, NEWUSER, REC_PRIVATE, READ_ONLY, REMOUNT, BIND = 0x20000, 0x10000000, 0x44000, 1, 32, 4096
def check(code):
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
check(libc.unshare(NEWNS | (NEWUSER if user else 0)))
if user:  # a mount needs a user name space then
    texts = {{"setgroups": "deny", "uid_map": f"0 {{user}} 1", "gid_map": f"0 {{group}} 1"}}
    for name, text in texts.items():
        with open(f"/proc/self/{{name}}", "w") as stream:
            stream.write(text)
check(libc.mount(None, b"/", None, REC_PRIVATE, None))
"""
TMPFS = MOUNT + 'check(libc.mount(b"tmpfs", folder, b"tmpfs", 0, b"size={size}"))\n'
READ_ONLY = MOUNT + (
    "check(libc.mount(folder, folder, None, BIND, None))\n"
    "check(libc.mount(None, folder, None, BIND | REMOUNT | READ_ONLY, None))\n"
)
FILL = """
import threading, time
def fill():
    while not os.path.exists({seen!r}):
        time.sleep(0.005)
    with open({ballast!r}, "wb", buffering=0) as stream:
        try:
            while stream.write(bytes(1 << 16)):
                pass
        except OSError:
            pass
threading.Thread(target=fill, daemon=True).start()
"""
KEEP = """
import shutil
import rotmole_cli
real = rotmole_cli.main
def main(words):
    code = real(words)
    shutil.copytree({folder!r}, {copy!r})
    return code
rotmole_cli.main = main
"""


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("disks")
    (root / "data").mkdir()
    return settings(write_model(root / "model"), write_data(root / "data"), root / "run")


@pytest.fixture
def disk(tmp_path) -> Path:
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.fixture
def train(rotmole_command, content, tmp_path) -> Callable:
    """A function that trains into a folder, with code to run before."""

    def call(output: Path, before: str, *words: str):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return rotmole_command("train", path, f"output_dir={output}", *words, before=before)

    return call


def test_a_read_only_folder_is_told_before_the_model_loads(train, disk):
    said = train(disk / "run", READ_ONLY.format(folder=str(disk)), "model.name=/no/such/model")
    assert said.code == 2  # the model comes first where it is not even there
    said = train(disk / "run", READ_ONLY.format(folder=str(disk)))
    assert said.code == 4
    assert "read-only" in said.error
    assert "loading" not in said.error
    assert list(disk.iterdir()) == []


def test_a_disk_too_small_for_the_checkpoints_is_told_before_training(train, disk, tmp_path):
    before = TMPFS.format(folder=str(disk), size="8m")
    before += KEEP.format(folder=str(disk), copy=str(tmp_path / "copy"))
    said = train(disk / "run", before)
    assert said.code == 4
    assert "MB free and the run needs about" in said.error
    assert "training:" not in said.error
    assert list((tmp_path / "copy").iterdir()) == []


def test_a_disk_that_fills_up_leaves_the_old_checkpoint(train, disk, tmp_path):
    """The run ends when the next checkpoint (or log line) does not fit, and goes on elsewhere."""
    run, copy = disk / "run", tmp_path / "copy"
    before = TMPFS.format(folder=str(disk), size="40m")
    before += FILL.format(seen=str(run / "checkpoint-5" / COMPLETE), ballast=str(disk / "ballast"))
    before += KEEP.format(folder=str(run), copy=str(copy))
    said = train(run, before, "training.max_steps=2000", "training.eval_strategy=no")
    assert said.code == 4, said.error
    assert "the disk is full" in said.error
    *_, newest = kept = checkpoints(copy)
    assert [faults(path) for path in kept] == [[] for _ in kept]
    assert not list(copy.rglob("*.tmp"))
    assert not (copy / "adapter").exists()
    text = (copy / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    step = int(newest.name[11:])
    words = ["--resume", "auto", f"training.max_steps={step + 2}", "training.eval_strategy=no"]
    assert train(copy, "", *words).code == 0
    steps = [row["step"] for row in read_metrics(copy / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, step + 3))


def test_figures_that_cannot_be_written_are_printed_and_may_go_elsewhere(
    rotmole_command, content, disk, tmp_path
):
    """The disk is read-only for the command, or full; the run's file lies on it."""
    run = disk / "run.yaml"
    run.write_text(yaml.safe_dump(content | {"output_dir": str(disk)}), encoding="utf-8")
    mounted = READ_ONLY.format(folder=str(disk))
    words = ["eval", run, "--limit", "1", "evaluation.max_new_tokens=2"]
    said = rotmole_command(*words, before=mounted)
    assert said.code == 4
    assert "perplexity" in said.output
    assert "written" not in said.output
    before, _, after = said.error.partition("likelihoods")
    assert "the file system is read-only; choose another folder." in before
    assert "--output DIR writes them elsewhere" in before
    assert after.splitlines()[-1].startswith("rotmole: cannot write ")
    elsewhere = rotmole_command(*words, "--output", tmp_path / "scores", before=mounted)
    assert elsewhere.code == 0, elsewhere.error
    names = {path.name for path in (tmp_path / "scores").iterdir()}
    assert names == {"eval.json", "predictions.jsonl"}
    full = TMPFS.format(folder=str(tmp_path / "full"), size="64k")
    full += f"open({str(tmp_path / 'full' / 'ballast')!r}, 'wb').write(bytes(60000))\n"
    (tmp_path / "full").mkdir()
    said = rotmole_command(*words, "--output", tmp_path / "full", before=full)
    assert said.code == 4
    assert "perplexity" in said.output
    assert "the disk is full" in said.error.partition("likelihoods")[0]
