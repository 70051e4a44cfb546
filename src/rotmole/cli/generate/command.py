"""``rotmole generate``: continue prompts with a trained adapter or a base model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import CHAT_TEMPLATE_FILE

from rotmole.cli.generate.answers import answer_file, answer_row, check_keys
from rotmole.cli.generate.prompts import Prompt, in_template, read_prompts
from rotmole.cli.screen import note, progress
from rotmole.errors import InputError
from rotmole.evaluation.generation import (
    Continuation,
    continuation,
    continuations,
    prompt_tokens,
)
from rotmole.evaluation.target import Target, find_target, load_target
from rotmole.models.endings import end_strings, end_tokens
from rotmole.models.limits import check_readable
from rotmole.training.checkpoints.seal import sha256
from rotmole.tuner.storage.weights import WEIGHTS


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: the maximum length of an answer in tokens.
        temperature: 0 is greedy.
        top_p: sample from the smallest set of tokens with at least this probability.
        seed: of the sampling, the same for each prompt.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def generate(
    target: Path,
    prompt: str | None = None,
    file: Path | None = None,
    *,
    lines: bool = False,
    output: Path | None = None,
    batch_size: int = 8,
    chat: bool | None = None,
    system: str | None = None,
    sampling: Sampling | None = None,
    stream: bool = True,
    trust_remote_code: bool = False,
) -> int:
    """Print the answer to each prompt, or write the answers to a file.

    Args:
        prompt: one prompt; None reads `file`, or standard input if `file` is None too.
        file: one prompt, or one in each row if its name ends in .jsonl.
        lines: each line of the file, or of standard input, is a prompt.
        output: a file for the answers as jsonl; if it is incomplete, it is continued.
        batch_size: prompts that are answered together. Sampled answers are made one at a time, so
            that an answer depends on its prompt and the seed alone.
        chat: whether prompts go through the chat template; None means if the adapter was trained
            on chats.
        system: text of a system message before each prompt.
        sampling: None is greedy.
        stream: print each token at once; not with output or rows of jsonl.

    Raises:
        InputError: a prompt cannot be read, or is too long for the model.
        StorageError: the output cannot be written; what is there can be continued.
    """
    sampling = sampling or Sampling()
    prompts = read_prompts(prompt, file, lines=lines)
    as_rows = output is not None or prompts[0].source is not None
    if as_rows:
        check_keys(prompts)
    _check_options(file, output, sampling)
    place = find_target(target, needs_data=False)
    loaded = load_target(place, say=note, trust_remote_code=trust_remote_code)
    model, tokenizer = loaded.model, loaded.tokenizer
    template = _template(place, prompts, tokenizer, chat, system)
    texts = [
        in_template(each, tokenizer, system=system, date=place.date) if template else each.text
        for each in prompts
    ]
    rows = [prompt_tokens(str(text), tokenizer) for text in texts]
    check_readable(
        model, tokenizer, zip([each.place for each in prompts], rows, strict=True),
        new_tokens=sampling.max_new_tokens,
        fix="set --max-new-tokens lower, or shorten the prompt",
    )  # fmt: skip
    if not as_rows and stream and streams_whole(model, tokenizer):
        _stream(model, tokenizer, rows, sampling)
        return 0
    batches = partial(_answers, model, tokenizer, batch_size=batch_size, sampling=sampling)
    if output is None:
        _print(prompts, batches(rows), as_rows=as_rows)
        return 0
    settings = {
        "model": loaded.name,
        "adapter": place.adapter and sha256(place.adapter / WEIGHTS),
        "chat": template,
        "system": system,
        "date": place.date if template else None,
        **vars(sampling),
    }
    _write(output, prompts, rows, settings, batches)
    return 0


def _check_options(file: Path | None, output: Path | None, sampling: Sampling) -> None:
    """Refuse or warn of options that contradict each other."""
    if file is not None and output is not None and file.resolve() == output.resolve():
        raise InputError(f"--output {output} is the file of the prompts; choose another.")
    if sampling.temperature == 0 and sampling.top_p < 1:
        warnings.warn(
            "top_p has no effect at temperature 0, which is greedy; set --temperature above 0",
            stacklevel=3,
        )


def _print(
    prompts: Sequence[Prompt], batches: Iterator[list[Continuation]], *, as_rows: bool
) -> None:
    """Print the answers, as rows of jsonl or as texts with a blank line between two."""
    for index, (each, answer) in enumerate(zip(prompts, _each(batches), strict=True)):
        text = answer_row(each, answer) if as_rows else "\n" * bool(index) + answer.text + "\n"
        print(text, end="", flush=True)


def _write(
    output: Path,
    prompts: Sequence[Prompt],
    rows: Sequence[list[int]],
    settings: dict[str, Any],
    batches: Callable[[Sequence[list[int]]], Iterator[list[Continuation]]],
) -> None:
    """Write the answers to a file, after those that it holds already."""
    with answer_file(output.expanduser(), prompts, settings) as answers, progress() as show:
        show("prompts", answers.done, len(prompts))
        for batch in batches(rows[answers.done :]):
            new = prompts[answers.done : answers.done + len(batch)]
            answers.add([answer_row(*pair) for pair in zip(new, batch, strict=True)])
            show("prompts", answers.done, len(prompts))
    print(f"written: {output} ({len(prompts)} answers)")


def _template(
    place: Target, prompts: Sequence[Prompt], tokenizer: Any, chat: bool | None, system: str | None
) -> bool:
    """Decide whether prompts go through the chat template, and say it if nobody asked.

    Raises:
        InputError: they cannot, or the options contradict each other.
    """
    chats = [each for each in prompts if each.text is None]
    if chats and chat is False:
        raise InputError(
            f"{chats[0].place} is a chat, which only a chat template can write; leave --raw out."
        )
    wanted = chat
    if wanted is None:
        wanted = bool(chats) or _is_chat(place)
        if wanted and not chats:
            note("the adapter was trained on chats: prompts are sent by the chat template (--raw)")
        elif not wanted and place.run is None and tokenizer.chat_template:
            note("prompts are sent as they are (--chat sends them by the model's chat template)")
    if system is not None and not wanted:
        raise InputError("--system needs the chat template; add --chat.")
    return wanted


def _is_chat(place: Target) -> bool:
    """Tell whether an adapter was trained on chats: by its run file, else by a file beside it."""
    if place.adapter is None:
        return False
    if place.run is not None:
        return any(task.format == "messages" for task in place.run.data.tasks.values())
    return (place.adapter / CHAT_TEMPLATE_FILE).is_file()


def streams_whole(model: Any, tokenizer: Any) -> bool:
    """Tell whether a streamer, which leaves special tokens out, would show no end of an answer."""
    ends = set(end_tokens(model, tokenizer))
    return ends <= set(tokenizer.all_special_ids) and not end_strings(model, tokenizer)


def _stream(model: Any, tokenizer: Any, rows: Sequence[list[int]], sampling: Sampling) -> None:
    from transformers import TextStreamer

    for index, row in enumerate(rows):
        if index:
            print()  # a blank line between answers
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        continuation(model, tokenizer, row, streamer=streamer, **vars(sampling))


def _answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[list[int]],
    batch_size: int,
    sampling: Sampling,
) -> Iterator[list[Continuation]]:
    """Yield the answers batch by batch, in order."""
    if sampling.temperature > 0:
        for row in rows:
            yield [continuation(model, tokenizer, row, **vars(sampling))]
        return
    for start in range(0, len(rows), batch_size):
        yield continuations(
            model,
            tokenizer,
            rows[start : start + batch_size],
            max_new_tokens=sampling.max_new_tokens,
            batch_size=batch_size,
        )


def _each(batches: Iterator[list[Continuation]]) -> Iterator[Continuation]:
    for batch in batches:
        yield from batch
