"""Split data sets of JSON Lines into the files that Q2's studies read, one a task and split.

    python experiments/study/split.py titles SOURCE FOLDER
    python experiments/study/split.py qa SOURCE FOLDER

titles: SOURCE has train.jsonl, validation.jsonl and test.jsonl with rows {lang, package, source,
body, title}, split by source package, so that no translation of a row stands in two splits. The
tasks are the languages.

qa: SOURCE has commonsense_qa, openbookqa and social_i_qa, each with train.jsonl and
validation.jsonl (openbookqa with test.jsonl) of rows {[context,] question, choices[], answer}.
SocialIQA asks a few kinds of question again and again; one of them, "How would you describe ...?",
is the task `describe`, so that a study can score a kind that nobody trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

HELD_OUT = "How would you describe"
FILES = {
    "titles": ("train", "validation", "test"),
    "qa": (
        "commonsense_qa/train", "commonsense_qa/validation",
        "openbookqa/train", "openbookqa/validation", "openbookqa/test",
        "social_i_qa/train", "social_i_qa/validation",
    ),
}  # fmt: skip


def kind(file: Path, row: dict[str, Any]) -> str:
    """Return the task of a question: its data set, or `describe` for the kind that is held out."""
    if file.parent.name == "social_i_qa" and row["question"].startswith(HELD_OUT):
        return "describe"
    return file.parent.name


TASK: dict[str, Callable[[Path, dict[str, Any]], str]] = {
    "titles": lambda _, row: str(row["lang"]),
    "qa": kind,
}


def main() -> None:
    """Write FOLDER/TASK.SPLIT.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mixture", choices=FILES)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for name in FILES[given.mixture]:
        file = given.source / f"{name}.jsonl"
        by_task: dict[str, list[str]] = {}
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                task = TASK[given.mixture](file, json.loads(line))
                by_task.setdefault(task, []).append(line)
        for task, rows in by_task.items():
            (given.folder / f"{task}.{file.name}").write_text("".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
