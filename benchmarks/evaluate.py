"""How much faster is `rotmole eval` than batches of padded rows, and does it find the same?

    python benchmarks/evaluate.py [--quick] [--data FOLDER] [--rows 20] [--csv FILE]

The built-in model with a RotMoLE adapter as it starts (tangent, E=4, R=6, K=2, on q, k, v, o).
Choices: likelihoods of the choices and of the correct answers of mixed questions, as trees of
common beginnings against one padded row a text. FOLDER holds folders with validation.jsonl
(question, choices, answer, and context if there is one); without it the questions are locale rows
with the answers of three others. Generation: greedy answers to locale prompts with finished rows
leaving, in batches of 64 and of 16, against whole batches of 16. Times are those of the processor,
so that other work on the machine matters little. Printed besides: the figures of both ways, and
how many choices or texts differ, which is none in float32 (--dtype float32).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from common import (
    SHAPES,
    Row,
    adapter_config,
    alternate,
    finish,
    model_type,
    parser,
    ratio,
    run,
    show,
    start,
)
from step import TARGETS

BATCH = 16
KINDS = ("dates", "numbers", "units")


def locale_examples(kind: str, count: int) -> list[Any]:
    """Return at most `count` rows of each language, in which answers of neighbours are choices."""
    from rotmole.config.schema import TaskSection
    from rotmole.data.examples import Example
    from rotmole.data.locale import locale_rows

    task = TaskSection(source="locale", kind=kind, limit={"validation": count})
    rows = [row.columns for row in locale_rows(task, "validation", seed=0)]
    answers = [" " + row["completion"] for row in rows]
    return [
        Example(kind, row["language"], row["id"], row["prompt"].rstrip(" "), answers[index],
                choices=tuple(answers[(index + other) % len(rows)] for other in range(4)), answer=0)
        for index, row in enumerate(rows)
    ]  # fmt: skip


def asked(folder: Path, count: int) -> list[Any]:
    """Return the first rows of every set of questions in a folder."""
    from rotmole.data.examples import Example

    examples = []
    for file in sorted(folder.glob("*/validation.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:count]]
        for number, row in enumerate(rows):
            if "choices" not in row:
                continue
            prompt = f"{row['context']}\n" if row.get("context") else ""
            choices = tuple(f" {choice}" for choice in row["choices"])
            examples.append(
                Example(file.parent.name, "", str(number),
                        f"{prompt}Question: {row['question']}\nAnswer:",
                        choices[row["answer"]], choices=choices, answer=row["answer"])
            )  # fmt: skip
    return examples


def chosen(examples: Sequence[Any], values: Sequence[float]) -> list[int]:
    """Return the most likely choice of each row."""
    following = iter(values)
    each = [[next(following) for _ in row.choices] for row in examples]
    return [max(range(len(row)), key=row.__getitem__) for row in each]


def choices(model: Any, tokenizer: Any, examples: Sequence[Any]) -> dict[str, Callable[[], Any]]:
    """Return both ways to score the choices and answers of rows."""
    from rotmole.evaluation.scoring import log_likelihoods, scored_answers, scored_choices

    texts = scored_choices(examples, tokenizer) + scored_answers(examples, tokenizer)
    return {
        "padded rows": lambda: log_likelihoods(model, texts, batch_size=BATCH, apart=True),
        "trees": lambda: log_likelihoods(model, texts, batch_size=BATCH),
    }


def generation(model: Any, tokenizer: Any, rows: Sequence[Any]) -> dict[str, Callable[[], Any]]:
    """Return the ways to generate the answers of rows."""
    from rotmole.evaluation import generation as room

    prompts = [row.prompt for row in rows]
    options: dict[str, Any] = {"max_new_tokens": 64, "one_line": True}

    def whole() -> list[str]:
        with mock.patch.object(room, "can_leave", return_value=False):
            return room.answers(model, tokenizer, prompts, batch_size=BATCH, **options)

    def leaving(size: int) -> Callable[[], list[str]]:
        return lambda: room.answers(model, tokenizer, prompts, batch_size=size, **options)

    return {
        "whole batches of 16": whole,
        "rows leave batches of 16": leaving(BATCH),
        "rows leave batches of 64": leaving(4 * BATCH),
    }


def compared(
    steps: dict[str, Callable[[], Any]], about: tuple[str, str], rounds: int,
    figure: Callable[[Any], tuple[float, list[Any]]],
) -> list[Row]:  # fmt: skip
    """Time the ways in turns against the first, and say what they found."""
    results: dict[str, Any] = {}

    def kept(name: str) -> Callable[[], None]:
        return lambda: results.__setitem__(name, steps[name]())

    times = alternate({name: kept(name) for name in steps}, rounds, 0, clock=time.process_time)
    plain, *others = steps
    value, found = figure(results[plain])
    rows = []
    for name in others:
        now, ours = figure(results[name])
        differ = sum(a != b for a, b in zip(found, ours, strict=True))
        print(f"  {plain}: {value:.4f}; {name}: {now:.4f}; {differ} of {len(found)} rows differ")
        taken = ratio(times, plain, name)
        taken["ours"], taken["baseline"] = taken["baseline"], taken["ours"]
        rows.append(show(Row("evaluate", about[0], name, about[1], plain, **taken)))
    return rows


def main() -> int:
    """Measure choices and generation, with the adapter and without."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--data", type=Path, help="folder of folders with validation.jsonl")
    options.add_argument("--rows", type=int, default=20, help="rows of each set of questions")
    options.add_argument("--dtype", default=model_type(), help="type of the model")
    given = options.parse_args()
    start(given)
    count = 2 if given.quick else given.rows
    from peft import get_peft_model

    from rotmole.config.schema import ModelSection
    from rotmole.models.load import load_model

    loaded = load_model(ModelSection(dtype=given.dtype, device="cpu"), say=print)
    targets = TARGETS["q,k,v,o"]
    config = adapter_config("tangent", SHAPES[0], targets)
    config.init_weights = True  # an untrained adapter with B != 0 would write noise without end
    model = get_peft_model(loaded.model, config, autocast_adapter_dtype=False).eval()
    tokenizer = loaded.tokenizer
    locale = [row for kind in KINDS for row in locale_examples(kind, max(1, count // 10))]
    questions = asked(given.data, count) if given.data else locale
    rows: list[Row] = []

    def right(found: Any) -> tuple[float, list[Any]]:
        best = chosen(questions, found)
        good = sum(a == row.answer for a, row in zip(best, questions, strict=True))
        return good / len(questions), best

    def exact(found: Any) -> tuple[float, list[Any]]:
        good = sum(a == row.completion.strip() for a, row in zip(found, locale, strict=True))
        return good / len(locale), found

    source = "mixed QA" if given.data else "locale choices"
    about = f"{len(questions)} rows of {source} {given.dtype}", "rows per second"
    rows += compared(choices(model, tokenizer, questions), about, given.rounds, right)
    about = f"{len(locale)} locale prompts {given.dtype}", "rows per second"
    rows += compared(generation(model, tokenizer, locale), about, given.rounds, exact)
    return finish(rows, given)


if __name__ == "__main__":
    run(main)
