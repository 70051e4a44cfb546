"""Split the descriptions of packages by language: one file a language and split.

    python experiments/study/titles.py SOURCE FOLDER

SOURCE has train.jsonl, validation.jsonl and test.jsonl with rows {lang, package, source, body,
title}, split by source package, so that no translation of a row stands in two splits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    """Write FOLDER/LANGUAGE.SPLIT.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        by_language: dict[str, list[str]] = {}
        with (given.source / f"{split}.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                by_language.setdefault(json.loads(line)["lang"], []).append(line)
        for language, rows in by_language.items():
            path = given.folder / f"{language}.{split}.jsonl"
            path.write_text("".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
