"""Greedy answers in batches, and sampled text.

For every system, an answer ends at the end-of-sequence token and, if no correct answer of the task
has a line break, after the first line that is not blank. The second rule is there because an
untrained model continues after its answer and would otherwise never match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from rotmole.data.encode import tokenize_pair
from rotmole.evaluation.decoding import Stop, can_leave, decoded, last_position, padded_left
from rotmole.evaluation.scoring import Tick, evaluating, without_beginning
from rotmole.models.endings import end_strings, end_tokens
from rotmole.models.room import pass_bytes, token_bytes, tokens_that_fit
from rotmole.processes import over_batches, smallest

TOGETHER = 4
"""Batches whose leftovers are decoded together; processes share the work in such parts."""


def cut_answer(text: str, *, one_line: bool) -> str:
    """Return the answer in a generated text: stripped, and with one_line only its first line.

    Args:
        text: up to the end of sequence.
        one_line: the task's answers are single lines.
    """
    text = text.strip()
    return text.split("\n", 1)[0].strip() if one_line else text


def prompt_tokens(prompt: str, tokenizer: Any, *, longest: int | None = None) -> list[int]:
    """Return a prompt's token ids, at least one, as they are before an answer in training.

    Trailing spaces are removed because they belong to the answer: most vocabularies tokenise
    "Answer: 7" as "Answer:" + " 7".

    Args:
        longest: the maximum number of tokens; a longer prompt loses its beginning. None keeps all.
    """
    tokens, _ = tokenize_pair(tokenizer, prompt.rstrip(" "), "")
    if not tokens:
        start = tokenizer.bos_token_id
        tokens = [tokenizer.eos_token_id if start is None else start]
    if longest is not None:
        tokens, _ = without_beginning(tokenizer, tokens, 0, len(tokens) - longest)
    return tokens


class LineEnd(StoppingCriteria):
    """Stops a row at the first line break after something that is not blank."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        # A model may embed more tokens than its tokenizer has.
        vocabulary = max(len(tokenizer), model.get_output_embeddings().weight.shape[0])
        device = next(model.parameters()).device
        pieces = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        breaks_V, filled_V = torch.zeros(2, vocabulary, dtype=torch.bool)
        breaks_V[: len(pieces)] = torch.tensor(["\n" in piece for piece in pieces])
        filled_V[: len(pieces)] = torch.tensor([bool(piece.strip()) for piece in pieces])
        self.breaks_V, self.filled_V = breaks_V.to(device), filled_V.to(device)
        self.starts_B = torch.zeros(1, dtype=torch.long, device=device)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return [B], True for the rows of input_ids [B, T] that are finished.

        Tokens before column `starts_B` of their row are the prompt's.
        """
        place_T = torch.arange(input_ids.shape[1], device=input_ids.device)
        filled_BT = self.filled_V[input_ids] & (place_T >= self.starts_B[:, None])
        return self.breaks_V[input_ids[:, -1]] & filled_BT.any(dim=1)


def _configuration(
    tokenizer: Any,
    ends: Sequence[int],
    *,
    strings: Sequence[str] = (),
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> GenerationConfig:
    # Every setting that a model's own generation_config.json could change is given here.
    pad = tokenizer.pad_token_id
    sampled = temperature > 0
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampled,
        temperature=temperature if sampled else 1.0,
        top_p=top_p if sampled else 1.0,
        top_k=0 if sampled else 50,  # greedy: the default, about which transformers does not warn
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        eos_token_id=list(ends) or None,
        stop_strings=list(strings) or None,
        pad_token_id=(ends[0] if ends else 0) if pad is None else pad,
    )


def _continuation(
    tokens: Sequence[int], tokenizer: Any, ends: Sequence[int], strings: Sequence[str]
) -> Continuation:
    end = next((i for i, token in enumerate(tokens) if token in ends), None)
    text = str(
        tokenizer.decode(tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )
    ended = end is not None
    for string in strings:
        text, found, _ = text.partition(string)
        ended = ended or bool(found)
    return Continuation(text, ended)


@dataclass(frozen=True)
class Continuation:
    """A generated text, and whether it ended by itself or had the most tokens allowed."""

    text: str
    ended: bool


def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    one_line: bool = False,
    ends: Sequence[str] = (),
    tick: Tick | None = None,
    spread: bool = False,
) -> list[Continuation]:
    """Return greedy continuations of many prompts, in order.

    Finished rows leave their batch if the model's cache lets them (see `decoding`). Every batch
    size gives the same tokens, up to the rounding of the model's type: of two tokens whose scores
    are as good as equal, bfloat16 may choose the other one in another batch.

    Args:
        tokenizer: its padding side is not used.
        prompts: their token ids, from `prompt_tokens`.
        max_new_tokens: the maximum length of a continuation in tokens.
        batch_size: the most rows of a batch; fewer if the cache of so many does not fit into half
            of the free memory, but at least one.
        one_line: end after the first line that is not blank.
        ends: texts that end a continuation besides the end of sequence; see `end_tokens`.
        tick: called with the number of prompts that were finished since the last call.
        spread: share the prompts among the joined processes; each gets all texts.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    stops = end_tokens(model, tokenizer, ends)
    strings = end_strings(model, tokenizer, ends)
    config = _configuration(tokenizer, stops, max_new_tokens=max_new_tokens)
    line = LineEnd(model, tokenizer) if one_line else None
    string = [StopStringCriteria(tokenizer, strings)] if strings else []

    def stop(starts_B: torch.Tensor) -> list[StoppingCriteria]:
        if line is None:
            return [*string]
        line.starts_B = starts_B
        return [line, *string]

    longest = max(map(len, prompts), default=0)
    size = smallest(_rows_that_fit(model, longest, max_new_tokens, batch_size), spread=spread)
    leaves = can_leave(model)

    def answer(batch: Sequence[int]) -> dict[int, Continuation]:
        rows = [prompts[index] for index in batch]
        if leaves:
            each = None if spread else tick
            new = decoded(model, tokenizer, rows, size=size, config=config, stop=stop, tick=each)
        else:
            new = _whole_batch(model, tokenizer, rows, config, stop)
        texts = [_continuation(tokens, tokenizer, stops, strings) for tokens in new]
        return dict(zip(batch, texts, strict=True))

    def done(finished: Sequence[Sequence[int]]) -> None:
        if tick is not None and (spread or not leaves):
            tick(sum(map(len, finished)))

    # leftovers of batches join within these bounds, which do not depend on the processes
    part = size * TOGETHER if leaves else size
    parts = [order[start : start + part] for start in range(0, len(order), part)]
    with evaluating(model):
        results = over_batches(parts, answer, done, spread=spread)
    return [results[index] for index in range(len(prompts))]


def _rows_that_fit(model: Any, longest: int, max_new_tokens: int, most: int) -> int:
    """Return how many rows fit into memory: the cache of prompt and answer, the pass of the prompt.

    The cache counts twice, because it is copied when it grows.
    """
    reading = longest * pass_bytes(model, logits=False)
    each = 2 * token_bytes(model) * (longest + max_new_tokens) + reading
    return min(most, tokens_that_fit(model, max(1, each)))


def _whole_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    stop: Stop,
) -> list[list[int]]:
    """Return the new tokens of each prompt by one call of generate(), padded at their end."""
    ids_BT, mask_BT = padded_left(prompts, config.pad_token_id, model.device)
    length = ids_BT.shape[1]
    starts_B = torch.full((len(prompts),), length, device=ids_BT.device)
    output = model.generate(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        **last_position(model),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList(stop(starts_B)),
        tokenizer=tokenizer,
    )
    return list(output[:, length:].tolist())


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, one_line: bool, **options: Any
) -> list[str]:
    """Return greedy answers to many prompts, in order: `continuations` after `cut_answer`.

    Args:
        one_line: end after the first line that is not blank.
        options: those of `continuations`.
    """
    rows = [prompt_tokens(prompt, tokenizer) for prompt in prompts]
    texts = continuations(model, tokenizer, rows, one_line=one_line, **options)
    return [cut_answer(each.text, one_line=one_line) for each in texts]


def continuation(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    ends: Sequence[str] = (),
    streamer: Any = None,
) -> Continuation:
    """Return the continuation of one prompt up to its end.

    The same seed gives the same text; torch's random state is restored afterwards.

    Args:
        prompt: its token ids, from `prompt_tokens`.
        max_new_tokens: the maximum length of the continuation in tokens.
        temperature: 0 is greedy; otherwise logits are divided by it before sampling.
        top_p: sample from the smallest set of tokens with at least this probability.
        seed: of the sampling.
        ends: texts that end an answer besides the end of sequence; see `end_tokens`.
        streamer: a transformers streamer, which gets every token; None for none.
    """
    device = next(model.parameters()).device
    stops, strings = end_tokens(model, tokenizer, ends), end_strings(model, tokenizer, ends)
    config = _configuration(
        tokenizer,
        stops,
        strings=strings,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
    )
    ids_1T, mask_1T = padded_left([prompt], config.pad_token_id, device)
    devices = [device] if device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=ids_1T, attention_mask=mask_1T,
            generation_config=config, tokenizer=tokenizer, streamer=streamer,
        )  # fmt: skip
    tokens = output[0, ids_1T.shape[1] :].tolist()
    return _continuation(tokens, tokenizer, stops, strings)


def generate_text(model: Any, tokenizer: Any, prompt: str, **options: Any) -> str:
    """Return the continuation of one prompt up to its end.

    Args:
        options: those of `continuation`.
    """
    return continuation(model, tokenizer, prompt_tokens(prompt, tokenizer), **options).text
