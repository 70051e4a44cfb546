"""``rotmole generate``: continue prompts with a trained adapter or a base model."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from rotmole.cli.screen import note
from rotmole.errors import InputError
from rotmole.evaluation import generate_text
from rotmole.evaluation.target import find_target, load_target


def generate(
    target: Path,
    prompt: str | None = None,
    file: Path | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stream: bool = True,
    *,
    trust_remote_code: bool = False,
) -> int:
    """Print the continuation of each prompt; no template is applied to the prompts.

    Args:
        prompt: one prompt; None reads `file`, or standard input if `file` is None too.
        file: prompts, one per line; blank lines are skipped.
        max_new_tokens: the maximum length of a continuation in tokens.
        temperature: 0 is greedy.
        top_p: sample from the smallest set of tokens with at least this probability.
        seed: of the sampling, the same for each prompt.
        stream: print each token at once.
    """
    prompts = read_prompts(prompt, file)
    if temperature == 0 and top_p < 1:
        warnings.warn(
            "top_p has no effect at temperature 0, which is greedy; set --temperature above 0",
            stacklevel=2,
        )
    place = find_target(target, needs_data=False)
    loaded = load_target(place, say=note, trust_remote_code=trust_remote_code)
    streamer = None
    if stream:
        from transformers import TextStreamer

        streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for index, text in enumerate(prompts):
        if index:
            print()  # a blank line between answers
        answer = generate_text(
            loaded.model,
            loaded.tokenizer,
            text,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            streamer=streamer,
        )
        if not stream:
            print(answer, flush=True)
    return 0


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """Return the prompt, else the lines of the file, else the lines of standard input.

    Raises:
        InputError: both or none are given, the file cannot be read, or all lines are blank.
    """
    if prompt is not None and file is not None:
        raise InputError(f"give a prompt or --file {file}, not both.")
    if prompt is not None:
        return [prompt]
    if file is None and sys.stdin.isatty():
        raise InputError("there is no prompt; give one, or --file PATH, or pipe text in.")
    name = "standard input" if file is None else str(file)
    try:
        if file is None:
            text = sys.stdin.read()
        else:
            text = file.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}.") from error
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"{name} contains no prompt; write one per line.")
    return prompts
