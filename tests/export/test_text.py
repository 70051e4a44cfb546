from __future__ import annotations

from pathlib import Path

import pytest

from rotmole.errors import DataError
from rotmole.export.text import divided, general_passages, read_passages, tokenised
from tiny_folders import tokenizer


def test_the_general_text_is_divided_and_nothing_is_lost() -> None:
    passages = general_passages()
    assert len(passages) == len(set(passages)) > 30
    fitted, kept = divided(passages)
    assert sorted([*fitted, *kept]) == sorted(passages)
    assert len(kept) == len(passages) // 4
    assert any("def median" in passage for passage in passages)


def test_passages_of_a_file_keep_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one\n  indented\n\n\ntwo\n\nthree\n\nfour\n", encoding="utf-8")
    assert read_passages(file) == ["one\n  indented", "two", "three", "four"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"one\n\ntwo", "has 2 passages; at least 4"),
        (b"\xff\xfe\x00", "cannot be read as UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_a_text_that_cannot_be_used(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_passages(file)


def test_long_passages_are_cut_and_empty_ones_left_out() -> None:
    rows = tokenised(["red blue " * 50, "a", "the film is good"], tokenizer(), longest=12)
    assert len(rows[0]) == 12
    assert len(rows) == 2
