"""`rotmole generate --output` killed at each of its writes: the same command goes on from there."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tiny_folders import write_rows

pytestmark = pytest.mark.slow

AIM = "import ctypes; ctypes.CDLL(None).kill_at({below!r}.encode(), {at}, {notes!r}.encode())"

ROWS = [{"prompt": f"{i} plus {i} is" + " so" * (i % 3), "n": i} for i in range(5)]


@pytest.fixture
def generate(warm, adapter, tmp_path):
    """A function that answers the rows into out/answers.jsonl, with code to run before."""
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)

    def call(output: Path, before: str = "", *words: str) -> int:
        given = ["generate", str(adapter), "-f", str(rows), "--output", str(output)]
        given += ["--max-new-tokens", "4", "--batch-size", "3", *words]
        streams = {"out": str(tmp_path / "out.txt"), "err": str(tmp_path / "err.txt")}
        return warm.ask(words=given, folder=str(tmp_path), **streams, env={}, before=before)

    return call


def test_a_killed_command_goes_on_without_lost_or_doubled_rows(generate, tmp_path):
    whole, notes = tmp_path / "whole" / "answers.jsonl", tmp_path / "notes"
    aim = AIM.format(below=f"{whole.parent}/", at=0, notes=str(notes))
    assert generate(whole, aim) == 0, (tmp_path / "err.txt").read_text(encoding="utf-8")
    events = notes.read_text(encoding="utf-8").splitlines()
    written = [
        event for event in events if event.startswith("write") and event.endswith(whole.name)
    ]
    assert len(written) == 2  # batches
    rows = [json.loads(line) for line in whole.read_text(encoding="utf-8").splitlines()]
    assert [{key: row[key] for key in ("prompt", "n")} for row in rows] == ROWS
    one = tmp_path / "one" / "answers.jsonl"
    assert generate(one, "", "--batch-size", "1") == 0
    assert one.read_bytes() == whole.read_bytes()
    aims = [i for i, event in enumerate(events, start=1) if not event.endswith(".tmp")]
    for number in aims:
        file = tmp_path / str(number) / "answers.jsonl"
        aim = AIM.format(below=f"{file.parent}/", at=number, notes=str(tmp_path / "more"))
        assert generate(file, aim) == -signal.SIGKILL
        code = generate(file)
        said = (tmp_path / "err.txt").read_text(encoding="utf-8")
        if code:  # it died after the last row was there
            assert "holds 5 answers already" in said, events[number - 1]
        assert file.read_bytes() == whole.read_bytes(), events[number - 1]
        assert {path.name for path in file.parent.iterdir()} == {file.name}
