"""Three sets of multiple-choice questions for one mixture, one kind of question held out.

    python experiments/study/qa.py SOURCE FOLDER

SOURCE has commonsense_qa, openbookqa and social_i_qa, each with train.jsonl and validation.jsonl
(openbookqa with test.jsonl) of rows {[context,] question, choices[], answer}. SocialIQA asks a few
kinds of question again and again; one of them, "How would you describe ...?", goes into files of
its own (describe), so that a study can score a kind that nobody trained on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SETS = {
    "commonsense_qa": ("train", "validation"),
    "openbookqa": ("train", "validation", "test"),
    "social_i_qa": ("train", "validation"),
}
HELD_OUT = "How would you describe"


def main() -> None:
    """Write FOLDER/SET.SPLIT.jsonl and FOLDER/describe.SPLIT.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, splits in SETS.items():
        for split in splits:
            kept: dict[str, list[str]] = {}
            with (given.source / name / f"{split}.jsonl").open(encoding="utf-8") as lines:
                for line in lines:
                    unseen = json.loads(line)["question"].startswith(HELD_OUT)
                    held_out = name == "social_i_qa" and unseen
                    kept.setdefault("describe" if held_out else name, []).append(line)
            for written, rows in kept.items():
                path = given.folder / f"{written}.{split}.jsonl"
                path.write_text("".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
