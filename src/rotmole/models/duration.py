"""An estimate of the time of training, from a traced update and the speed of this machine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.benchmark import Timer

from rotmole.models.memory import Traced, traced_update

MEASURED = 0.15
"""Seconds that each of the three measurements takes."""

CALL = 6.0
"""Autograd, modules and hooks around an operation, in times of a bare small one; a guess."""


@dataclass(frozen=True)
class Speed:
    """What a device does in a second.

    Attributes:
        products: floating-point operations of a matrix product.
        bytes: that an elementwise operation writes.
        calls: operations on a few numbers.
    """

    products: float
    bytes: float
    calls: float


def measured_speed(device: torch.device, dtype: torch.dtype, *, rows: int, widths: Any) -> Speed:
    """Measure the speed of a device for half a second.

    Args:
        dtype: of the products.
        rows: tokens of a batch.
        widths: (in_features, out_features) of a typical layer.
    """
    inputs, outputs = widths
    options = {"device": device, "dtype": dtype}
    x, w = torch.ones(rows, inputs, **options), torch.ones(outputs, inputs, **options)
    y, one = torch.ones(rows, outputs, **options), torch.ones(8, **options)
    product = _seconds("x @ w.T", {"x": x, "w": w})
    write = _seconds("y * y", {"y": y})
    call = _seconds("one * one", {"one": one})
    return Speed(2 * rows * inputs * outputs / product, y.nbytes / write, 1 / call)


def estimate_update(
    model: Any, speed: Speed, *, batch: int, length: int, learnt: float, checkpointing: bool
) -> float:
    """Estimate the seconds of one forward and backward of a batch.

        seconds  = products / speed of products + bytes written / speed of bytes
                   + 6 * operations / speed of calls
        products = those of one traced forward and backward + 4 * learnt * D * V for the head

    Args:
        model: the adapted model on the meta device; its parameters are replaced by fake ones.
        speed: of the device.
        batch: rows of a micro-batch.
        length: tokens of a row, padding included.
        learnt: tokens of the batch that have labels.
        checkpointing: recompute activations in the backward pass.
    """
    work: Traced = traced_update(model, batch=batch, length=length, checkpointing=checkpointing)
    vocabulary, width = model.get_input_embeddings().weight.shape
    head = 4 * learnt * width * vocabulary
    logits = 4 * 4 * learnt * vocabulary  # logits, float32, log-softmax, gradient
    return (
        (work.products + head) / speed.products
        + (work.written + logits) / speed.bytes
        + CALL * work.calls / speed.calls
    )


def typical_widths(model: Any) -> tuple[int, int]:
    """Return (in_features, out_features) of the shape that holds most of the base's weights."""
    ends = [model.get_input_embeddings(), model.get_base_model().get_output_embeddings()]
    outside = {id(module.weight) for module in ends if module is not None}
    sizes: Counter[tuple[int, int]] = Counter()
    for weight in model.parameters():
        if weight.ndim == 2 and not weight.requires_grad and id(weight) not in outside:
            sizes[weight.shape[1], weight.shape[0]] += weight.numel()
    return max(sizes, key=lambda shape: sizes[shape], default=tuple(ends[0].weight.shape))


def _seconds(statement: str, names: dict[str, torch.Tensor]) -> float:
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=MEASURED).median)
