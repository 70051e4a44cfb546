"""Greedy answers in batches, and sampled text.

How an answer is cut, for every system alike: at the end-of-sequence token; and, where no right
answer of the task holds a line break, after the first line that is not blank. An untrained model
runs on after its answer; without the second rule it could score on no task at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from rotmole.data.encode import tokenize_pair
from rotmole.evaluation.scoring import Tick, context_window, evaluating, keeps_logits
from rotmole.processes import over_batches


def cut_answer(text: str, *, one_line: bool) -> str:
    """Outer white space off; with one_line only the first line.

    Args:
        text: generated text, up to the end of sequence.
        one_line: the task's answers are single lines.
    """
    text = text.strip()
    return text.split("\n", 1)[0].strip() if one_line else text


def prompt_tokens(prompt: str, tokenizer: Any, *, window: int) -> list[int]:
    """Tokens of a prompt as they stand before an answer in training.

    Trailing spaces are left to the answer: tokenised as one text with it, "Answer: 7" becomes
    "Answer:" + " 7" with most vocabularies.

    Args:
        window: most tokens; a longer prompt loses its beginning.

    Returns:
        Token ids, at least one.
    """
    tokens, _ = tokenize_pair(tokenizer, prompt.rstrip(" "), "")
    if not tokens:
        start = tokenizer.bos_token_id
        tokens = [tokenizer.eos_token_id if start is None else start]
    return tokens[-window:]


def end_tokens(model: Any, tokenizer: Any, ends: Sequence[str] = ()) -> list[int]:
    """Every token that ends a text: the model's own, the tokenizer's, and those of `ends`.

    Args:
        ends: what a chat template writes after an answer where that is not the end of sequence;
            its special tokens count, or the whole of it where it is one token.

    Returns:
        Token ids, sorted.
    """
    own = getattr(model.generation_config, "eos_token_id", None)
    found = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    for end in ends:
        tokens = tokenizer(end, add_special_tokens=False)["input_ids"]
        found |= set(tokens) & set(tokenizer.all_special_ids)
        found |= set(tokens) if len(tokens) == 1 else set()
    return sorted(int(token) for token in found if token is not None)


class LineEnd(StoppingCriteria):
    """Stops a row at the first line break after something that is not blank."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        # A model's table may be larger than its tokenizer's.
        vocabulary = max(len(tokenizer), model.get_output_embeddings().weight.shape[0])
        device = next(model.parameters()).device
        pieces = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        breaks_V, filled_V = torch.zeros(2, vocabulary, dtype=torch.bool)
        breaks_V[: len(pieces)] = torch.tensor(["\n" in piece for piece in pieces])
        filled_V[: len(pieces)] = torch.tensor([bool(piece.strip()) for piece in pieces])
        self.breaks_V, self.filled_V = breaks_V.to(device), filled_V.to(device)
        self.prompt_length = 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """True for the rows of input_ids [B, T] that are finished."""
        new_BT = input_ids[:, self.prompt_length :]
        return self.breaks_V[new_BT[:, -1]] & self.filled_V[new_BT].any(dim=1)


def _configuration(
    tokenizer: Any,
    ends: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> GenerationConfig:
    # All settings a model folder could bring along are named: greedy has to mean greedy.
    pad = tokenizer.pad_token_id
    sampled = temperature > 0
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampled,
        temperature=temperature if sampled else 1.0,
        top_p=top_p if sampled else 1.0,
        top_k=0 if sampled else 50,  # 50 is the default that says nothing for greedy
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        eos_token_id=list(ends) or None,
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


def _decode(tokens: Sequence[int], tokenizer: Any, ends: Sequence[int]) -> str:
    end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return str(
        tokenizer.decode(tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def _last_position(model: Any) -> dict[str, torch.Tensor]:
    """Ask for the logits of the last position by its index.

    generate() asks by a slice, which is not contiguous: torch then multiplies the rows of a batch
    by one copy each of the whole vocabulary matrix (five seconds for 48 rows of SmolLM2-135M).
    """
    if not keeps_logits(model):
        return {}
    return {"logits_to_keep": torch.tensor([-1], device=model.device)}


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    one_line: bool,
    ends: Sequence[str] = (),
    tick: Tick | None = None,
    spread: bool = False,
) -> list[str]:
    """Greedy answers to many prompts, in batches padded on the left.

    Args:
        tokenizer: its tokenizer; its own padding side does not matter.
        max_new_tokens: longest answer in tokens.
        batch_size: prompts per batch.
        one_line: stop and cut after the first line that is not blank.
        ends: texts that end an answer besides the end of sequence; see `end_tokens`.
        tick: called with the number of prompts finished after each batch.
        spread: share the batches among the joined processes; each gets all answers.

    Returns:
        One cut answer per prompt, in order.
    """
    window = max(1, context_window(model) - max_new_tokens)
    rows = [prompt_tokens(prompt, tokenizer, window=window) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    stops = end_tokens(model, tokenizer, ends)
    config = _configuration(tokenizer, stops, max_new_tokens=max_new_tokens)
    stop = LineEnd(model, tokenizer) if one_line else None

    def answer(batch: Sequence[int]) -> dict[int, str]:
        inputs = _padded_left([rows[i] for i in batch], config.pad_token_id, model.device)
        length = inputs["input_ids"].shape[1]
        if stop:
            stop.prompt_length = length
        output = model.generate(
            **inputs,
            **_last_position(model),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stop] if stop else []),
        )
        texts = [_decode(tokens, tokenizer, stops) for tokens in output[:, length:].tolist()]
        return {i: cut_answer(t, one_line=one_line) for i, t in zip(batch, texts, strict=True)}

    def done(finished: Sequence[Sequence[int]]) -> None:
        if tick is not None:
            tick(sum(map(len, finished)))

    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with evaluating(model):
        found = over_batches(batches, answer, done, spread=spread)
    return [found[index] for index in range(len(rows))]


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    streamer: Any = None,
) -> str:
    """Continue one prompt; the same seed gives the same text, and no global state changes.

    Args:
        max_new_tokens: longest continuation in tokens.
        temperature: 0 is greedy; otherwise logits are divided by it before sampling.
        top_p: sample from the smallest set of tokens with at least this probability.
        seed: of the sampling.
        streamer: an object with transformers' put and end, told of every token.

    Returns:
        The continuation up to the end of sequence, uncut.
    """
    device = next(model.parameters()).device
    window = max(1, context_window(model) - max_new_tokens)
    stops = end_tokens(model, tokenizer)
    config = _configuration(
        tokenizer, stops, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
    )
    inputs = _padded_left(
        [prompt_tokens(prompt, tokenizer, window=window)], config.pad_token_id, device
    )
    devices = [device] if device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        output = model.generate(**inputs, generation_config=config, streamer=streamer)
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    return _decode(tokens, tokenizer, stops)
