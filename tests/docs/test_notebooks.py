"""The notebooks are clean, and their run files and commands are ones that rotmole takes.

`make notebooks` executes them.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from rotmole.comparison.study import is_study, load_study
from rotmole.config.load import load_run
from rotmole_cli.commands import app

FILES = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def cells(file: Path, kind: str = "code") -> list[dict[str, Any]]:
    return [
        cell | {"source": "".join(cell["source"])}
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == kind
    ]


def test_it_is_kept_without_outputs(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    book = json.loads(text)
    assert text == json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    assert [cell["id"] for cell in book["cells"]] == [
        f"{file.stem}-{number}" for number in range(len(book["cells"]))
    ]
    assert {*book["metadata"]} == {"kernelspec", "language_info"}
    for cell in book["cells"]:
        assert not cell["metadata"]
        assert cell["source"]
    for cell in cells(file):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.slow
def test_its_files_and_commands_are_taken(file: Path, tmp_path: Path) -> None:
    files = commands = 0
    for cell in cells(file):
        first, _, rest = cell["source"].partition("\n")
        if first.startswith("%%writefile "):
            written = tmp_path / first.split()[1]
            written.write_text(rest, encoding="utf-8")
            read = load_study if is_study(written) else load_run
            read(written)
            assert yaml.safe_load(rest)["output_dir"].startswith("runs/")
            files += 1
        elif first == "%%bash":
            for line in rest.splitlines():
                program, name, *words = shlex.split(line)
                assert program == "rotmole"
                command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined] # a group
                command.make_context(name, words)
                commands += 1
        else:
            compile(cell["source"], file.name, "exec")
    assert files
    assert commands


def test_its_links_lead_to_files(file: Path) -> None:
    for cell in cells(file, "markdown"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", cell["source"]):
            assert (file.parent / link).exists(), link
