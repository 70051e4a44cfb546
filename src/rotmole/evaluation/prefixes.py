"""Texts that begin alike as one row of tokens, in which every common beginning is computed once.

The row is a tree: each token attends to the tokens of its own text alone, and has the position that
it has there. So a prompt with five choices costs the prompt once and the tokens of five choices,
and rows with the same worked examples share those as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotmole.data.encode import common_prefix
from rotmole.models.logits import accepts_logits_to_keep
from rotmole.tuner.batch.tokens import reads_sequences
from rotmole.tuner.experts.experts import Experts

_OF_SEQUENCES = {"XLORA", "ADAPTION_PROMPT"}
"""PEFT's methods that change more than single tokens, besides those that put tokens in front."""


@dataclass(frozen=True)
class Tree:
    """Texts as one row of T tokens.

    Attributes:
        tokens: ids.
        positions: of each token in its text.
        paths: for each text the indices of its tokens in the row.
    """

    tokens: list[int]
    positions: list[int]
    paths: list[list[int]]

    def arguments(self, model: Any) -> dict[str, Any]:
        """Return what the model's forward takes."""
        device = model.device
        ids_1T = torch.tensor([self.tokens], device=device)
        positions_1T = torch.tensor([self.positions], device=device)
        arguments = {"input_ids": ids_1T, "position_ids": positions_1T, "use_cache": False}
        if self.positions != list(range(len(self.tokens))):  # more than one text
            arguments["attention_mask"] = self._mask(model).to(device)
        return arguments

    def _mask(self, model: Any) -> Tensor:
        """Return [1, 1, T, T] which token sees which, or the numbers that eager attention adds."""
        visible_TT = torch.zeros(len(self.tokens), len(self.tokens), dtype=torch.bool)
        for path in self.paths:
            path_S = torch.tensor(path, dtype=torch.long)
            before_SS = torch.ones(len(path), len(path), dtype=torch.bool).tril()
            visible_TT[path_S[:, None], path_S] |= before_SS
        if model.config.get_text_config()._attn_implementation == "sdpa":
            return visible_TT[None, None]
        hidden_TT = torch.zeros(visible_TT.shape, dtype=model.dtype)
        return hidden_TT.masked_fill(~visible_TT, torch.finfo(model.dtype).min)[None, None]


def tree_of(texts: Sequence[Sequence[int]]) -> Tree:
    """Lay out texts in ascending order; each adds what it does not share with the one before."""
    tree = Tree([], [], [])
    last: Sequence[int] = ()
    path: list[int] = []
    for text in texts:
        shared = common_prefix(last, text)
        first = len(tree.tokens)
        path = path[:shared] + list(range(first, first + len(text) - shared))
        tree.tokens.extend(text[shared:])
        tree.positions.extend(range(shared, len(text)))
        tree.paths.append(path)
        last = text
    return tree


def forests(
    texts: Sequence[Sequence[int]], order: Sequence[int], most: int
) -> tuple[list[list[int]], int]:
    """Share out texts among forward passes.

    Args:
        texts: token ids.
        order: of the texts, ascending.
        most: the most tokens of a pass; a longer text has one for itself.

    Returns:
        The numbers of the texts of each pass, and the tokens of all passes.
    """
    passes: list[list[int]] = []
    total = size = 0
    last: Sequence[int] = ()
    for index in order:
        new = len(texts[index]) - common_prefix(last, texts[index])
        if not passes or size + new > most:
            passes.append([])
            size, new = 0, len(texts[index])
        passes[-1].append(index)
        size, total = size + new, total + new
        last = texts[index]
    return passes, total


def keeps_apart(model: Any, longest: int) -> bool:
    """Whether a model computes each text of a tree as it does alone.

    Its attention must take a mask of tokens by tokens, its positions must be given by argument, and
    nothing may carry over from token to token besides attention. No: recurrent layers, ALiBi,
    attention by flash kernels, windows that a text exceeds, prompt tuning, expert_choice.

    Args:
        model: a causal language model, or a PeftModel around one.
        longest: tokens of the longest text.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    if not (
        getattr(base, "_supports_attention_backend", False)
        and config._attn_implementation in ("sdpa", "eager")
        and "position_ids" in inspect.signature(base.forward).parameters
        and accepts_logits_to_keep(model)
    ):
        return False
    if getattr(base, "_is_stateful", True) or getattr(config, "alibi", False):
        return False
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if not kinds <= {"full_attention", "sliding_attention"} or hasattr(config, "index_topk"):
        return False
    if window is not None and longest > window:
        return False
    return _adapters_keep_apart(model)


def _adapters_keep_apart(model: Any) -> bool:
    for config in getattr(model, "peft_config", {}).values():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning or kind in _OF_SEQUENCES:
            return False
        if getattr(config, "alora_invocation_tokens", None):
            return False
    experts = (module for module in model.modules() if isinstance(module, Experts))
    return not any(reads_sequences(each.spec.selection) for each in experts)
