"""The adapted model as one ONNX graph, checked in onnxruntime against torch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rotmole.errors import ConfigError, ModelError

FILE = "model.onnx"
TOLERANCE = 1e-4
INPUTS = ("input_ids", "attention_mask")
_PROTOBUF_LIMIT = 1 << 31
_SHAPES = ((2, 9), (1, 2), (3, 17))


class _Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).logits
        return logits


def export_onnx(model: Any, folder: Path) -> float:
    """Write model.onnx: input_ids and attention_mask [batch, length] -> logits [batch, length, V].

    Batch and length may be any numbers. There is no key-value cache: a program that generates
    with it reads the whole text again for each token.

    Args:
        model: in float32 on the CPU, with its adapter; it is switched to eval mode.
        folder: exists; weights of more than 2 GB lie beside the graph in model.onnx.data.

    Returns:
        The largest difference between onnxruntime's logits and torch's, on batches of three
        shapes, two of which have padding on the left.

    Raises:
        ConfigError: onnx, onnxscript or onnxruntime is not installed.
        ModelError: the model cannot be written as a graph, or the graph computes something else.
    """
    _check_packages()
    model.eval()
    module = _Logits(model).eval()
    ids_BT, mask_BT = _inputs(*_SHAPES[0], model)
    batch = torch.export.Dim("batch", min=1, max=1 << 12)
    length = torch.export.Dim("length", min=2, max=1 << 20)
    shape = {0: batch, 1: length}
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's tracing, about its own code
            program = torch.onnx.export(
                module,
                (ids_BT, mask_BT),
                input_names=list(INPUTS),
                output_names=["logits"],
                dynamic_shapes=(shape, shape),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch.export and onnxscript raise errors of many classes
        short = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the model cannot be written as an ONNX graph: {short} ({type(error).__name__})."
        ) from error
    assert program is not None  # it is None only if torch writes the file itself
    program.save(folder / FILE, external_data=size > _PROTOBUF_LIMIT // 2)
    difference = _difference(module, folder / FILE)
    if not difference <= TOLERANCE:
        raise ModelError(
            f"onnxruntime's logits differ from torch's by {difference:.2g}, more than "
            f"{TOLERANCE:g}, so the graph is not the model; nothing was written."
        )
    return difference


def _check_packages() -> None:
    try:
        import onnxruntime  # noqa: F401 - whether it is there
        import onnxscript  # noqa: F401 - whether it is there
    except ImportError as error:
        raise ConfigError(f"--onnx needs {error.name}: pip install 'rotmole[onnx]'.") from error


def _inputs(rows: int, columns: int, model: Any) -> tuple[Tensor, Tensor]:
    """Return token ids and a mask whose first row begins with padding, if it is long enough."""
    generator = torch.Generator().manual_seed(rows)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids_BT = torch.randint(0, vocabulary, (rows, columns), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, : columns // 4] = 0
    return ids_BT, mask_BT


def _difference(module: _Logits, file: Path) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    largest = 0.0
    for rows, columns in _SHAPES:
        ids_BT, mask_BT = _inputs(rows, columns, module.model)
        inputs = {"input_ids": ids_BT.numpy(), "attention_mask": mask_BT.numpy()}
        (found,) = session.run(None, inputs)
        with torch.no_grad():
            expected_BTV = module(ids_BT, mask_BT)
        read = mask_BT.bool()  # what is said at a padded position is nobody's business
        difference = (torch.from_numpy(found) - expected_BTV)[read].abs().max()
        largest = max(largest, float(difference))
    return largest
