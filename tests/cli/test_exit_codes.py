"""Every outcome has its exit code and one sentence on stderr, without a traceback."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import rotmole.cli.doctor
from rotmole import errors
from rotmole_cli import main


def raising(monkeypatch, error):
    """Let the verb doctor end in an error; the way from there to the exit code is the real one."""

    def fail(adapter):
        raise error

    monkeypatch.setattr(rotmole.cli.doctor, "doctor", fail)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InputError("bad"), 2),
        (errors.ConfigError(["a", "b"], "run.yaml"), 2),
        (errors.DataError("bad"), 2),
        (errors.ModelError("bad"), 2),
        (errors.AdapterError("bad"), 2),
        (errors.NonFiniteError("bad"), 3),
        (errors.StorageError("bad"), 4),
        (errors.RotMoleError("bad"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 4),
        (OSError(errno.EROFS, "Read-only file system"), 4),
        (PermissionError(errno.EACCES, "Permission denied"), 4),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300), 2),
        (ModuleNotFoundError("No module named 'x'", name="x"), 2),
        (MemoryError(), 1),
        (ZeroDivisionError("x"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(7), 7),
    ],
)
def test_each_error_has_its_code(error, code, monkeypatch, capsys):
    raising(monkeypatch, error)
    assert main(["doctor"]) == code
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    if not isinstance(error, SystemExit):
        assert shown.startswith("rotmole: ")


def test_of_a_launchers_processes_one_does_what_is_not_shared(monkeypatch, capsys):
    raising(monkeypatch, errors.InputError("bad"))
    monkeypatch.setenv("RANK", "1")
    assert main(["doctor"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["train", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err.startswith("rotmole: [rank 1] ")
    monkeypatch.setenv("RANK", "0")
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "rotmole: bad\n"


def test_every_error_of_the_library_is_covered():
    listed = {2, 3, 4, 1}
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    assert {c.exit_code for c in classes if issubclass(c, errors.RotMoleError)} == listed


@pytest.mark.parametrize("words", [["--debug", "doctor"], ["doctor", "--debug"]])
def test_debug_shows_the_traceback_from_any_place(words, monkeypatch, capsys):
    raising(monkeypatch, errors.ModelError("bad"))
    assert main(words) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_result_is_the_exit_code(monkeypatch):
    monkeypatch.setattr(rotmole.cli.doctor, "doctor", lambda adapter: 130)
    assert main(["doctor"]) == 130


def test_a_missing_extra_is_named(monkeypatch, capsys):
    raising(monkeypatch, ModuleNotFoundError("No module named 'trl'", name="trl"))
    main(["doctor"])
    assert "this needs trl: pip install 'rotmole[train]'" in capsys.readouterr().err


def test_warnings_are_plain_lines_and_the_filters_come_back(monkeypatch, capsys):
    def warn(adapter):
        warnings.warn("x has no effect", UserWarning, stacklevel=1)
        warnings.warn("of a library", FutureWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(rotmole.cli.doctor, "doctor", warn)
    before = list(warnings.filters)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().err == "warning: x has no effect\n"
    assert warnings.filters == before


@pytest.mark.parametrize("words", [["nonsense"], ["train"], ["init", "--nonsense"], []])
def test_wrong_usage(words, capsys):
    assert main(words) == 2
    shown = capsys.readouterr()
    assert "Usage: rotmole" in shown.err + shown.out


def test_sigterm_is_143_and_the_handler_comes_back(monkeypatch, capsys):
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(
        rotmole.cli.doctor, "doctor", lambda adapter: os.kill(os.getpid(), signal.SIGTERM)
    )
    assert main(["doctor"]) == 143
    assert capsys.readouterr().err == "rotmole: terminated.\n"
    assert signal.signal(signal.SIGTERM, before) is signal.SIG_DFL


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_a_real_process(number, code, tmp_path):
    """The process waits for a prompt on stdin when the signal comes."""
    script = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started us with &
import rotmole_cli.init
def wait(*_, **__):
    print("waiting", flush=True)
    sys.stdin.read()
rotmole_cli.init.init = wait
from rotmole_cli import main
sys.exit(main(["init"]))
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, **pipes) as process:
        assert process.stdout.readline() == b"waiting\n"
        process.send_signal(number)
        _, shown = process.communicate()
    assert process.returncode == code
    assert shown.startswith(b"rotmole: ")
    assert b"Traceback" not in shown


def test_a_reader_that_stops_early(tmp_path):
    """`rotmole init --list | head` ends quietly."""
    script = """
import sys
from rotmole_cli import main
sys.stdin.read()
sys.exit(main(["init", "--list"]))
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-u", "-c", script], **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        shown = process.stderr.read()
    assert process.returncode == 0
    assert shown == b""


def test_python_dash_m_is_the_same_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "rotmole_cli", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    script = Path(sys.executable).with_name("rotmole")
    again = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == again.stdout
