"""The output file of `rotmole generate`: rows of jsonl, which an interrupted command continues."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rotmole.cli.generate.prompts import Prompt
from rotmole.cli.screen import note
from rotmole.errors import InputError
from rotmole.evaluation.generation import Continuation
from rotmole.files import atomic_write_text, make_folder, storage_errors

TEXT, REASON = "generated_text", "finish_reason"


def answer_row(prompt: Prompt, answer: Continuation) -> str:
    """Return the line for one answer: the prompt's row, the text, and why it ended."""
    reason = "stop" if answer.ended else "length"
    return json.dumps({**prompt.row, TEXT: answer.text, REASON: reason}, ensure_ascii=False) + "\n"


def check_keys(prompts: Sequence[Prompt]) -> None:
    """Refuse rows that have a key which the answer would replace.

    Raises:
        InputError: names the first such row.
    """
    for prompt in prompts:
        for key in {TEXT, REASON} & set(prompt.row):
            raise InputError(
                f"{prompt.place} has {key!r}, which the answer would replace; rename that key."
            )


class AnswerFile:
    """A file of answers, one row for each prompt, in order.

    While it is incomplete, `.NAME.settings` beside it holds what the answers were made with. A
    command that is killed leaves whole rows and perhaps a part of one, which is removed.

    Args:
        path: the file.
        prompts: all prompts.
        settings: what decides an answer, beside the prompt.

    Attributes:
        done: how many rows the file has.

    Raises:
        InputError: the file holds rows of other prompts or settings, or all of them.
        StorageError: it cannot be written.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt], settings: Mapping[str, Any]) -> None:
        self.path, self._settings = path, path.with_name(f".{path.name}.settings")
        text = json.dumps(settings, indent=1, ensure_ascii=False, default=str) + "\n"
        self.done = self._rows_of_before(prompts, json.loads(text)) if path.exists() else 0
        atomic_write_text(self._settings, text)
        with storage_errors(path):
            self._stream = path.open("ab")

    def add(self, rows: Sequence[str]) -> None:
        """Append whole rows, and flush them to the disk."""
        with storage_errors(self.path):
            self._stream.write("".join(rows).encode())
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self.done += len(rows)

    def finish(self) -> None:
        """Say that all rows are there."""
        self._stream.close()
        left = self.path.parent.glob(f".{escape(self._settings.name)}.*.tmp")  # by a kill
        with storage_errors(self._settings):
            for file in (self._settings, *left):
                file.unlink()

    def close(self) -> None:
        """Close the file; it may be incomplete."""
        self._stream.close()

    def _rows_of_before(self, prompts: Sequence[Prompt], settings: Mapping[str, Any]) -> int:
        with storage_errors(self.path):
            raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        lines = raw[:whole].split(b"\n")[:-1]
        choose = "choose another --output, or delete it to begin anew"
        if self._settings.exists():
            self._compare(settings, choose)
        elif len(lines) >= len(prompts):
            raise InputError(f"{self.path} holds {len(lines)} answers already; {choose}.")
        elif lines:
            note(
                f"{self.path} holds {len(lines)} answers, but not the settings they were made with;"
                " they are kept as they are."
            )
        for number, line in enumerate(lines):
            if number >= len(prompts) or not _answers(line, prompts[number]):
                raise InputError(
                    f"{self.path}: row {number + 1} is no answer to prompt {number + 1}; {choose}."
                )
        if whole < len(raw):
            with storage_errors(self.path):
                os.truncate(self.path, whole)
        return len(lines)

    def _compare(self, settings: Mapping[str, Any], choose: str) -> None:
        try:
            kept = json.loads(self._settings.read_text(encoding="utf-8"))
            names = sorted({*kept, *settings})
        except (OSError, ValueError, TypeError):
            raise InputError(
                f"{self._settings} cannot be read, so nothing says how the answers in {self.path} "
                f"were made; {choose}."
            ) from None
        changed = [
            f"{name} {kept.get(name)} (now {settings.get(name)})"
            for name in names
            if kept.get(name) != settings.get(name)
        ]
        if changed:
            raise InputError(f"{self.path} was begun with {', '.join(changed)}; {choose}.")


def _answers(line: bytes, prompt: Prompt) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    if not isinstance(row, dict) or TEXT not in row:
        return False
    return all(key in row and row[key] == value for key, value in prompt.row.items())


@contextmanager
def answer_file(
    path: Path, prompts: Sequence[Prompt], settings: Mapping[str, Any]
) -> Iterator[AnswerFile]:
    """Hold an answer file against other processes; if the block fails, it can be continued.

    Raises:
        InputError: another process writes it, or as of AnswerFile.
        StorageError: it cannot be written.
    """
    make_folder(path.parent)
    lock = path.with_name(f".{path.name}.lock")
    with storage_errors(lock):
        try:
            held = FileLock(lock, timeout=0)
            held.acquire()
        except Timeout:
            raise InputError(f"{path} is being written by another process.") from None
    try:
        file = AnswerFile(path, prompts, settings)
        try:
            yield file
        except BaseException:
            if file.done < len(prompts):
                note(
                    f"{file.done} of {len(prompts)} answers are in {path}; the same command goes "
                    "on from there."
                )
            raise
        finally:
            file.close()
        file.finish()
    finally:
        with suppress(OSError):
            lock.unlink()
        held.release()
