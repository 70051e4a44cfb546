"""Execute the notebooks of docs/notebooks as they stand, each in an empty folder.

    python tests/notebooks.py [NAME ...]

A cell that fails ends the run with its traceback. What was executed is written, with its
outputs, to .cache/notebooks/.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "docs" / "notebooks"
DONE = ROOT / ".cache" / "notebooks"
LONGEST = 600  # seconds of one cell


def execute(file: Path) -> float:
    """Execute one notebook and return the seconds that it took."""
    book = nbformat.read(file, as_version=4)
    begin = time.monotonic()
    with TemporaryDirectory() as folder:
        client = NotebookClient(book, timeout=LONGEST, resources={"metadata": {"path": folder}})
        try:
            client.execute()
        finally:
            DONE.mkdir(parents=True, exist_ok=True)
            nbformat.write(book, DONE / file.name)
    return time.monotonic() - begin


def main(names: list[str]) -> int:
    """Execute the notebooks that are named, or all."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    files = [file for file in sorted(NOTEBOOKS.glob("*.ipynb")) if not names or file.stem in names]
    for file in files:
        print(f"{file.name}: {execute(file):.0f} s", flush=True)
    return not files


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
