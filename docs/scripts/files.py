"""Write docs/files.md: every source file with the first line of its docstring, room by room.

    python docs/scripts/files.py [FILE]

The rooms stand in pipeline order. A room is a folder under src/rotmole; its first line is that of
its `__init__.py`.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
DOCUMENT = ROOT / "docs" / "files.md"
ROOMS = (
    "ops", "tuner", "optim", "config", "models", "data", "recording", "training", "evaluation",
    "inspection", "comparison", "export", "serving", "plugins", "cli",
)  # fmt: skip
HEAD = """# Every source file in one line

`make pages` writes this page from the docstrings. [tour.md](tour.md) says how the rooms belong
together.
"""


def first_line(file: Path) -> str:
    """Return the first line of a module's docstring, with Markdown's quotes."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n")[0].replace("``", "`").replace("|", "\\|")


def _place(file: Path) -> tuple[int, str, str]:
    """Sort the ground floor first, then the rooms in pipeline order, then the command."""
    package, *folders = file.relative_to(SOURCE).parts[:-1]
    if package != "rotmole":
        return len(ROOMS) + 1, "", file.name
    if not folders:
        return 0, "", file.name
    room = ROOMS.index(folders[0]) + 1  # a new room needs its place in ROOMS
    return room, "/".join(folders), file.name


def text() -> str:
    """Return the whole page."""
    folders: dict[Path, list[Path]] = {}
    for file in sorted(SOURCE.rglob("*.py"), key=_place):
        folders.setdefault(file.parent, []).append(file)
    lines = [HEAD]
    for folder, files in folders.items():
        lines.append(f"## {folder.relative_to(SOURCE)}/\n")
        face = [file for file in files if file.name == "__init__.py"]
        lines += [f"{first_line(face[0])}\n"] if face else []
        modules = [file for file in files if file not in face]
        if modules:
            lines += ["| file | what it does |", "|---|---|"]
            lines += [f"| `{file.name}` | {first_line(file)} |" for file in modules]
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else DOCUMENT).write_text(text(), encoding="utf-8")
