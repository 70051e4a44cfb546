"""The rows of a run as `rotmole check` shows them: counts, faults, and one row as it is learnt."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from rotmole.config.schema import RunFile, Split
from rotmole.data import Example, encode, encode_all, load_splits, repeated
from rotmole.data.encode import IGNORED
from rotmole.errors import DataError
from rotmole.models.limits import check_readable

UNLIMITED = 1 << 30
SHOWN_LINES = 6
SHOWN_PARTS = 9
GUTTER = 12
WIDTH = 80
COLUMNS = ("rows", "tokens", "learnt", "answers", "longest", "cut")


@dataclass(frozen=True)
class Rows:
    """The rows of one task and split that can be used.

    Attributes:
        encoded: the ids and labels of each example.
    """

    task: str
    split: Split
    examples: list[Example]
    encoded: list[dict[str, Any]]

    @property
    def lengths(self) -> list[int]:
        """The tokens of each row."""
        return [len(row["input_ids"]) for row in self.encoded]

    @property
    def learnt(self) -> int:
        """The tokens of all rows that have labels."""
        return sum(label != IGNORED for row in self.encoded for label in row["labels"])

    @property
    def answers(self) -> int:
        """The stretches of tokens that have labels: in a chat, the answers that are learnt."""
        return sum(
            learnt
            for row in self.encoded
            for learnt, _ in groupby(row["labels"], lambda label: label != IGNORED)
        )


def load_rows(
    run: RunFile, model: Any, tokenizer: Any, max_length: int | None
) -> tuple[list[Rows], list[DataError]]:
    """Read and encode every row of every task and split, whatever is wrong with others.

    Args:
        model: what it cannot read is a fault.
        max_length: training.max_length; None sets no limit.

    Returns:
        The rows of each task and split that has some, and the faults of all files and rows.
    """
    loaded: list[Rows] = []
    faults: dict[str, DataError] = {}  # by message: tasks may share a file
    for name, task in run.data.tasks.items():
        # one task at a time, so that the rows of the others can be looked at
        data = run.data.model_copy(update={"tasks": {name: task}})
        try:
            splits = load_splits(data, seed=run.seed, tokenizer=tokenizer)
        except DataError as error:
            faults |= {str(fault): fault for fault in error.faults}
            continue
        for split, examples in splits.items():
            rows = Rows(name, split, [], [])
            refused = [
                *_encode(rows, examples.get(name, []), tokenizer, max_length or UNLIMITED),
                *_unreadable(rows, model, tokenizer),
            ]
            faults |= {str(fault): fault for fault in refused}
            if rows.examples:
                loaded.append(rows)
    return loaded, list(faults.values())


def print_table(loaded: Sequence[Rows]) -> None:
    """Print one line for each task and split, within 80 columns."""
    columns = zip(*map(_counts, loaded), strict=True)
    widths = [max(7, *(len(f"{n:,}") for n in column)) + 1 for column in columns]
    room = WIDTH - 2 - 11 - sum(widths)
    names = [_elided(rows.task, max(room - 1, 8)) for rows in loaded]
    wide = max(map(cell_len, ["task", *names])) + 1
    heads = "".join(f"{head:>{width}}" for head, width in zip(COLUMNS, widths, strict=True))
    print(f"  {'task':<{wide}}{'split':<11}{heads}")
    for name, rows in zip(names, loaded, strict=True):
        counts = zip(_counts(rows), widths, strict=True)
        figures = "".join(f"{count:>{width},}" for count, width in counts)
        print(f"  {name}{' ' * (wide - cell_len(name))}{rows.split:<11}{figures}")


def print_example(rows: Rows, tokenizer: Any) -> None:
    """Print the first row as the model sees it; lines of tokens that are learnt begin with >."""
    example, encoded = rows.examples[0], rows.encoded[0]
    whole = len(encoded["input_ids"])
    learnt = sum(label != IGNORED for label in encoded["labels"])
    console = Console(soft_wrap=True, highlight=False)
    name = _elided(rows.task, 30)
    console.print(
        Text(f"example     {name}: {whole:,} tokens, {learnt:,} learnt (lines with >)\n").append(
            " " * GUTTER + _elided(example.place, WIDTH - GUTTER)
        )
    )
    for answer, is_learnt, text in _middle_left_out(list(_parts(rows, tokenizer))):
        for number, line in enumerate(_lines(text)):
            name = ("answer" if answer else "prompt") if not number else ""
            style = "bold green" if is_learnt else ""
            console.print(Text(f"{name:>9} {'>' if is_learnt else ' '} ").append(line, style))


def _encode(
    rows: Rows, examples: Sequence[Example], tokenizer: Any, limit: int
) -> Iterator[DataError]:
    """Fill `rows` with what can be encoded; yield an error for each other row."""
    try:  # all at once, which is faster
        rows.encoded.extend(encode_all(examples, tokenizer, max_length=limit))
    except DataError:
        pass
    else:
        rows.examples.extend(examples)
        return
    for example in examples:
        try:
            rows.encoded.append(encode(example, tokenizer, max_length=limit))
        except DataError as error:
            # rows that are refused for the same reason differ in their place and numbers
            kind = re.sub(r"\d+", "", str(error).replace(example.place, ""))
            source = f"task '{rows.task}', split {rows.split}"
            yield DataError(str(error), source=source, kind=kind)
        else:
            rows.examples.append(example)


def _unreadable(rows: Rows, model: Any, tokenizer: Any) -> list[DataError]:
    places = (example.place for example in rows.examples)
    try:
        check_readable(
            model, tokenizer, zip(places, (row["input_ids"] for row in rows.encoded), strict=True)
        )
    except DataError as error:
        return [error]
    return []


def _counts(rows: Rows) -> tuple[int, ...]:
    lengths = rows.lengths
    longest = max(lengths, default=0)
    cut = sum(row["cut"] for row in rows.encoded)
    return len(lengths), sum(lengths), rows.learnt, rows.answers, longest, cut


def _repeated(loaded: Sequence[Rows]) -> Iterator[str]:
    """Say which rows are trained on and scored as well."""
    by_split: dict[str, dict[str, list[Example]]] = {}
    for rows in loaded:
        by_split.setdefault(rows.split, {})[rows.task] = rows.examples
    train = by_split.pop("train", {})
    for split, tasks in by_split.items():
        for task, count in repeated(tasks, train).items():
            yield (
                f"twice       {_elided(task, 30)}: {count:,} of {len(tasks[task]):,} {split} rows "
                "are training rows too"
            )


def _parts(rows: Rows, tokenizer: Any) -> Iterator[tuple[bool, bool, str]]:
    """Yield the stretches of the first row: whether an answer, whether learnt, the text."""
    example, encoded = rows.examples[0], rows.encoded[0]
    ids, labels = encoded["input_ids"], encoded["labels"]
    plain = replace(example, loss_on="completion")  # its labels say which tokens are answers
    answers = encode(plain, tokenizer, max_length=UNLIMITED)["labels"][-len(ids) :]
    kinds = [(a != IGNORED, b != IGNORED) for a, b in zip(answers, labels, strict=False)]
    for (answer, learnt), group in groupby(range(len(ids)), lambda index: kinds[index]):
        text = tokenizer.decode([ids[i] for i in group], clean_up_tokenization_spaces=False)
        yield answer, learnt, text


def _middle_left_out(parts: list[tuple[bool, bool, str]]) -> list[tuple[bool, bool, str]]:
    if len(parts) <= SHOWN_PARTS:
        return parts
    half = SHOWN_PARTS // 2
    count = len(parts) - 2 * half
    return [*parts[:half], (False, False, f"... {count:,} more prompts and answers ..."),
            *parts[-half:]]  # fmt: skip


def _lines(text: str) -> list[str]:
    """Wrap a text to the screen; of a long one, leave out the middle."""
    # control characters of the data must not reach the terminal
    plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    width = min(WIDTH, shutil.get_terminal_size().columns)
    console = Console(width=width)
    wrapped = Text(plain).wrap(console, max(width - GUTTER, 20), overflow="fold")
    lines = [line.plain for line in wrapped] or [""]
    if len(lines) <= SHOWN_LINES:
        return lines
    half = SHOWN_LINES // 2
    return [*lines[:half], f"... {len(lines) - 2 * half:,} more lines ...", *lines[-half:]]


def _elided(name: str, width: int) -> str:
    if cell_len(name) <= width:
        return name
    half = (width - 3) // 2
    return f"{name[:half]}...{name[len(name) - half :]}"


def print_rows(loaded: Sequence[Rows], tokenizer: Any) -> None:
    """Print how many rows there are, and the first row of each task."""
    if loaded:
        print_table(loaded)
    for line in _repeated(loaded):
        print(line)
    first: dict[str, Rows] = {}
    for rows in loaded:
        first.setdefault(rows.task, rows)
    for rows in first.values():
        print_example(rows, tokenizer)
