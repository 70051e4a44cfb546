"""Worked examples in the prompt, which show an untrained model the form of an answer."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rotmole.data.examples import Example
from rotmole.errors import ConfigError

SEPARATOR = "\n\n"


def with_examples(
    example: Example, demonstrations: Mapping[str, Sequence[Example]], *, count: int, seed: int
) -> Example:
    """Return the row with worked examples of its task before its prompt.

    prompt = d_1.prompt d_1.completion SEPARATOR ... d_k.prompt d_k.completion SEPARATOR prompt

    They come from the same group (language) if it has enough rows, else from the whole task. The
    choice depends on the seed, the task and the row's id alone, so it is the same for all systems.

    Args:
        demonstrations: training rows by task.
        count: number of worked examples; 0 returns the row as it is.

    Raises:
        ConfigError: the task has fewer than `count` training rows.
    """
    if count == 0:
        return example
    whole = [row for row in demonstrations.get(example.task, ()) if row.prompt != example.prompt]
    same = [row for row in whole if row.group == example.group]
    pool = same if len(same) >= count else whole
    if len(pool) < count:
        raise ConfigError(
            f"evaluation.examples_in_prompt is {count}, but task {example.task!r} has only "
            f"{len(pool)} training rows to show; set it lower or give the task more of them."
        )
    draw = random.Random(f"{seed}/{example.task}/{example.id}").sample(pool, count)
    shown = [row.prompt + row.completion for row in draw]
    prompt = SEPARATOR.join([*shown, example.prompt])
    moved = len(prompt) - len(example.prompt)
    learnt = tuple((start + moved, stop + moved) for start, stop in example.learnt)
    return replace(example, prompt=prompt, learnt=learnt)
