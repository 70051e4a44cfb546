"""Worked examples in the prompt, so that an untrained model is shown the form of an answer."""

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
    """The example with worked examples of its task before its prompt.

    prompt = d_1.prompt d_1.completion SEPARATOR ... d_k.prompt d_k.completion SEPARATOR prompt

    They come from the same group (language) where it has enough of them, else from the whole
    task. The draw depends on the seed, the task and the row's id alone: every system sees the same.

    Args:
        demonstrations: training rows by task.
        count: how many; 0 returns the example as it is.

    Returns:
        The same row with a longer prompt.

    Raises:
        ConfigError: the task has fewer training rows than that.
    """
    if count == 0:
        return example
    whole = [row for row in demonstrations.get(example.task, ()) if row.prompt != example.prompt]
    same = [row for row in whole if row.group == example.group]
    pool = same if len(same) >= count else whole
    if len(pool) < count:
        raise ConfigError(
            f"evaluation.examples_in_prompt is {count}, but task {example.task!r} has {len(pool)} "
            "training rows to show; set it lower or give the task a train split."
        )
    draw = random.Random(f"{seed}/{example.task}/{example.id}").sample(pool, count)
    shown = [row.prompt + row.completion for row in draw]
    return replace(example, prompt=SEPARATOR.join([*shown, example.prompt]))
