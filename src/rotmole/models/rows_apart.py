"""Whether a model keeps the rows of one sequence apart: tried out with two rows, not looked up.

transformers makes a mask of blocks from positions that begin anew, for eager attention, sdpa and
flex attention, and flash attention takes the lengths. Models that make a mask of their own (OPT,
Falcon, BLOOM, MPT), and layers that carry a state (Mamba), ignore both and raise no error.
"""

from __future__ import annotations

import copy
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rotmole.config.schema import ModelSection
from rotmole.errors import ModelError
from rotmole.models.load import load_config

LARGEST = 250_000_000
"""Parameters of the model of few layers that `check` builds: 1 GB in float32."""

OTHER_SHAPES = 16
"""Units of rounding of the largest logit by which a row alone may differ from one in a pack."""


def check_rows_apart(model: Any, *, flat: bool) -> None:
    """Refuse a model that lets rows of one sequence see each other.

    The logits of a row must be what they are when it stands alone, whatever row stands before it.
    An adapter on the model is left out.

    Args:
        model: a causal language model with weights, or a PeftModel around one.
        flat: whether batches are one sequence, whose lengths are given too.

    Raises:
        ModelError: naming the model and its attention.
    """
    is_adapted = hasattr(model, "disable_adapter")
    base = model.get_base_model() if is_adapted else model
    without: AbstractContextManager[Any] = model.disable_adapter() if is_adapted else nullcontext()
    modes = {module: module.training for module in base.modules()}
    base.eval()
    try:
        with torch.no_grad(), without:
            reason = _mixed(base, flat)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if reason:
        config = base.config
        raise ModelError(
            "training.packing and training.padding_free put several rows into one sequence, and "
            f"{config.model_type} with attention {config._attn_implementation!r} {reason}; leave "
            "both out, or use train_sampling_strategy: group_by_length to save padding"
        )


def check_without_weights(
    section: ModelSection, *, flat: bool, trust_remote_code: bool = False
) -> bool:
    """Do what check_rows_apart does for a model that is not loaded: by one layer of each kind.

    Args:
        section: the run file's `model:` section.
        flat, trust_remote_code: as of check_rows_apart and load_config.

    Returns:
        False if the layers are too large to be built here; training looks again.

    Raises:
        ModelError: as of check_rows_apart.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(section, trust_remote_code=trust_remote_code)
    small = _of_few_layers(config)
    options = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(copy.deepcopy(small), **options)
        if sum(parameter.numel() for parameter in empty.parameters()) > LARGEST:
            return False
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(small, **options)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError, RuntimeError):
        return False  # a configuration that knows no model of so few layers
    check_rows_apart(model, flat=flat)
    return True


def _of_few_layers(config: Any) -> Any:
    """Return a configuration of one layer of each kind, with a small vocabulary."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    kinds = getattr(text, "layer_types", None) or ["one"]
    kept = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, [value[place] for place in kept])
    text.num_hidden_layers = len(kept)
    text.vocab_size = 32
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    return small


def _mixed(base: Any, flat: bool) -> str:
    """Return how rows are mixed, in words; "" if they are not."""
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return "takes no positions that begin anew"
    device = base.get_input_embeddings().weight.device
    embedded = base.get_input_embeddings().weight.shape[0]
    special = {base.config.get_text_config().pad_token_id}
    ids = [token for token in range(1, min(embedded, 32)) if token not in special]
    first, other, row = ids[:3], ids[3:6], ids[6:10]

    def of_row(before: list[int]) -> Tensor:
        lengths = [n for n in (len(before), len(row)) if n]
        output = base(**_arguments(before + row, lengths, flat, device), use_cache=False)
        logits: Tensor = output.logits[0, len(before) :].float()
        return logits

    try:
        after, after_other, alone = of_row(first), of_row(other), of_row([])
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return f"cannot read them ({' '.join(str(error).split()) or type(error).__name__})"
    unit = torch.finfo(base.dtype).eps * float(alone.abs().max())
    # 0 but where a base's experts get other numbers of tokens, whose products round otherwise
    if float((after - after_other).abs().max()) > unit:
        return "lets them see each other"
    differs = float((after - alone).abs().max()) > OTHER_SHAPES * unit
    return "does not begin anew with each" if differs else ""


def _arguments(ids: list[int], lengths: list[int], flat: bool, device: Any) -> dict[str, Any]:
    """Return what rotmole.data.PackedCollator makes of rows of these lengths."""
    places = torch.cat([torch.arange(n) for n in lengths])
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    given: dict[str, Any] = {
        "input_ids": torch.tensor([ids], device=device),
        "position_ids": places[None].to(device),
        "seq_idx": number[None].int().to(device),
    }
    if flat:
        ends = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        given |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        given |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return given
