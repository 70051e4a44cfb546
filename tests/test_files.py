from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rotmole.errors
import rotmole.files
from rotmole.errors import StorageError
from rotmole.files import (
    atomic_write_bytes,
    atomic_write_text,
    make_folder,
    storage_errors,
    whole_folder,
)

SOURCES = [rotmole.errors.__file__, rotmole.files.__file__]
LIGHT = """
import importlib.util, sys, types
for name in ("rotmole",):  # the package without its heavy parts
    sys.modules[name] = types.ModuleType(name)
def load(name, file):
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
errors = load("rotmole.errors", sys.argv[2])
files = load("rotmole.files", sys.argv[3])
"""


def test_text_is_utf8_with_the_line_ends_given(tmp_path):
    path = atomic_write_text(tmp_path / "größe.txt", "ä\r\nb\n")
    assert path.read_bytes() == "ä\r\nb\n".encode()
    assert [file.name for file in tmp_path.iterdir()] == ["größe.txt"]


@given(data=st.binary(max_size=200))
def test_bytes_come_back(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bytes"
    atomic_write_bytes(path, data)
    assert path.read_bytes() == data


def test_the_mode_is_that_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").write_text("")
    ours = atomic_write_text(tmp_path / "ours", "")
    assert ours.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (errno.ENOSPC, "full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission"),
        (errno.EBUSY, os.strerror(errno.EBUSY)),
    ],
)
def test_every_os_error_is_one_sentence_with_the_path(number, word):
    with pytest.raises(StorageError, match=word) as caught, storage_errors("some/file"):
        raise OSError(number, os.strerror(number))
    assert "'some/file'" in str(caught.value)
    assert caught.value.exit_code == 4


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(StorageError, match="does not exist"):
        atomic_write_text(tmp_path / "no" / "file", "x")


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(StorageError):
        atomic_write_text(tmp_path / "file", "x")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="not a folder"):
        make_folder(tmp_path / "file")
    with pytest.raises(StorageError, match="not a folder"):
        make_folder(tmp_path / "file" / "below")
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert make_folder(tmp_path / "a" / "b").is_dir()


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    """The write fails for real: the process may not make files larger than 1000 bytes."""
    path = tmp_path / "file"
    path.write_text("old")
    code = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    files.atomic_write_bytes(sys.argv[1], bytes(5000))
except errors.StorageError as error:
    print(error)
"""
    command = [sys.executable, "-c", LIGHT + code, str(path), *SOURCES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert str(path) in done.stdout
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    """A writer is killed at random moments; the file is always one of the two contents."""
    path = tmp_path / "file"
    contents = {b"a" * 300_000, b"b" * 300_000}
    code = """
print("go", flush=True)
while True:
    for letter in (b"a", b"b"):
        files.atomic_write_bytes(sys.argv[1], letter * 300_000)
"""
    for attempt in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", LIGHT + code, str(path), *SOURCES], stdout=subprocess.PIPE
        ) as writer:
            try:
                assert writer.stdout.readline() == b"go\n"
                deadline = time.monotonic() + 0.05 + 0.013 * attempt
                while time.monotonic() < deadline:
                    if path.exists():
                        assert path.read_bytes() in contents
            finally:
                writer.kill()
        assert Path(path).read_bytes() in contents


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path):
    with whole_folder(tmp_path / "new" / "folder") as fresh:
        (fresh / "inner").mkdir()
        (fresh / "inner" / "file").write_text("x", encoding="utf-8")
        (fresh / "private").touch(0o600)
        assert not (tmp_path / "new" / "folder").exists()
    assert (tmp_path / "new" / "folder" / "inner" / "file").read_text(encoding="utf-8") == "x"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]
    (tmp_path / "ordinary").touch()
    ordinary = (tmp_path / "ordinary").stat().st_mode
    assert (tmp_path / "new" / "folder" / "private").stat().st_mode == ordinary


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "full"), ValueError])
def test_a_folder_that_is_not_whole_leaves_nothing(tmp_path, error):
    (tmp_path / "folder").mkdir()  # an empty one may be there

    def fill() -> None:
        with whole_folder(tmp_path / "folder") as fresh:
            (fresh / "file").touch()
            raise error

    with pytest.raises(StorageError if isinstance(error, OSError) else error):
        fill()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert not list((tmp_path / "folder").iterdir())


def test_what_is_in_a_folder_is_never_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    (tmp_path / "file").touch()
    for name in ("folder", "file"):
        with (
            pytest.raises(StorageError, match="no empty folder"),
            whole_folder(tmp_path / name),
        ):
            raise AssertionError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
