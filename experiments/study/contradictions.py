"""Write rows of six functions of the same numbers, which a word of the prompt tells apart.

    python experiments/study/contradictions.py FOLDER [--seed N]

The prompt is "WORD: NUMBER ->". All tasks have the same numbers in a split, and no number stands in
two splits: 600 to train on, 24 to validate on, 60 to test on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

SIZES = {"train": 600, "validation": 24, "test": 60}
FUNCTIONS: dict[str, Callable[[int], int | str]] = {
    "next": lambda number: number + 1,
    "previous": lambda number: number - 1,
    "reverse": lambda number: str(number)[::-1],
    "double": lambda number: 2 * number,
    "digits": lambda number: sum(map(int, str(number))),
    "last": lambda number: number % 10,
}


def main() -> None:
    """Write one file a task and split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    numbers = iter(random.Random(given.seed).sample(range(100, 1000), sum(SIZES.values())))
    for split, size in SIZES.items():
        chosen = [next(numbers) for _ in range(size)]
        for word, function in FUNCTIONS.items():
            rows = [
                {"prompt": f"{word}: {number} ->", "completion": f" {function(number)}"}
                for number in chosen
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (given.folder / f"{word}.{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
