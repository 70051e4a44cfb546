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
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from rotmole.data.encode import tokenize_pair
from rotmole.evaluation.scoring import Tick, evaluating, without_beginning
from rotmole.models.endings import end_strings, end_tokens
from rotmole.models.logits import accepts_logits_to_keep
from rotmole.processes import over_batches


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
        self.prompt_length = 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return [B], True for the rows of input_ids [B, T] that are finished."""
        new_BT = input_ids[:, self.prompt_length :]
        return self.breaks_V[new_BT[:, -1]] & self.filled_V[new_BT].any(dim=1)


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


def _padded_left(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    ids_BT = torch.full((len(rows), length), pad, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), length, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids_BT[row, length - len(tokens) :] = torch.tensor(tokens)
        mask_BT[row, length - len(tokens) :] = 1
    return {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}


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


def _last_position(model: Any) -> dict[str, torch.Tensor]:
    """Return the argument that asks for the logits of the last position by its index.

    generate() asks by a slice, which is not contiguous: torch then multiplies each row of a batch
    by its own copy of the vocabulary matrix (five seconds for 48 rows of SmolLM2-135M).
    """
    if not accepts_logits_to_keep(model):
        return {}
    return {"logits_to_keep": torch.tensor([-1], device=model.device)}


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
    """Return greedy continuations of many prompts, in order; batches are padded on the left.

    Args:
        tokenizer: its padding side is not used.
        prompts: their token ids, from `prompt_tokens`.
        max_new_tokens: the maximum length of a continuation in tokens.
        one_line: end after the first line that is not blank.
        ends: texts that end a continuation besides the end of sequence; see `end_tokens`.
        tick: called after each batch with the number of prompts it finished.
        spread: share the batches among the joined processes; each gets all texts.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    stops = end_tokens(model, tokenizer, ends)
    strings = end_strings(model, tokenizer, ends)
    config = _configuration(tokenizer, stops, strings=strings, max_new_tokens=max_new_tokens)
    stop = LineEnd(model, tokenizer) if one_line else None

    def answer(batch: Sequence[int]) -> dict[int, Continuation]:
        inputs = _padded_left([prompts[i] for i in batch], config.pad_token_id, model.device)
        length = inputs["input_ids"].shape[1]
        if stop:
            stop.prompt_length = length
        output = model.generate(
            **inputs,
            **_last_position(model),
            generation_config=config,
            tokenizer=tokenizer,  # reads stop strings
            stopping_criteria=StoppingCriteriaList([stop] if stop else []),
        )
        texts = [
            _continuation(tokens, tokenizer, stops, strings)
            for tokens in output[:, length:].tolist()
        ]
        return dict(zip(batch, texts, strict=True))

    def done(finished: Sequence[Sequence[int]]) -> None:
        if tick is not None:
            tick(sum(map(len, finished)))

    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with evaluating(model):
        results = over_batches(batches, answer, done, spread=spread)
    return [results[index] for index in range(len(prompts))]


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
    inputs = _padded_left([prompt], config.pad_token_id, device)
    devices = [device] if device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        output = model.generate(
            **inputs, generation_config=config, tokenizer=tokenizer, streamer=streamer
        )
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    return _continuation(tokens, tokenizer, stops, strings)


def generate_text(model: Any, tokenizer: Any, prompt: str, **options: Any) -> str:
    """Return the continuation of one prompt up to its end.

    Args:
        options: those of `continuation`.
    """
    return continuation(model, tokenizer, prompt_tokens(prompt, tokenizer), **options).text
