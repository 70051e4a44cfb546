"""`rotmole exec` becomes another program that knows the method."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rotmole_cli import main
from rotmole_cli.exec import ExecError, program

SCRIPT = """
import sys
from pathlib import Path
from peft import PeftType
assert Path(__file__).parent == Path(sys.path[0]), sys.path
import beside
print(sys.argv[1:], "ROTMOLE" in PeftType.__members__, __name__)
sys.exit(7)
"""


@pytest.mark.slow
def test_a_file_gets_its_arguments_and_gives_its_exit_code(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "beside.py").write_text("", encoding="utf-8")
    words = ["python", str(tmp_path / "script.py"), "--debug", "a", "--", "b"]
    done = subprocess.run(
        [sys.executable, "-m", "rotmole_cli", "exec", "--", *words],
        capture_output=True, text=True, check=False, env=os.environ | {"RANK": "1"},
    )  # fmt: skip
    assert done.stdout == "['--debug', 'a', '--', 'b'] True __main__\n", done.stderr
    assert done.stderr == ""
    assert done.returncode == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a command"),
        (["-m"], "needs the name of a module"),
        (["-m", "no.such.module"], "there is no module 'no.such.module'"),
        (["-c", "1"], "-c is an option of Python"),
        (["none.py"], "there is no file none.py"),
        (["pytst"], "there is no command 'pytst' in this environment; did you mean 'pytest'"),
        (["sh"], "is no Python program of this environment"),
    ],
)
def test_what_is_no_program(words, message, capsys):
    with pytest.raises(ExecError, match=message):
        program(words)
    assert main(["exec", "--", *words]) == 2
    assert message in capsys.readouterr().err


def test_console_scripts_and_modules(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["json.tool", "--help"])
    with pytest.raises(SystemExit):
        program(["-m", "json.tool"])()
    assert "usage" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["pytest", "--version"])
    assert program(["pytest"])() == 0
