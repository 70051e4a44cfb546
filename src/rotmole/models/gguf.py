"""GGUF files through transformers' own loader, made trainable and savable again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rotmole.errors import ConfigError, ModelError

_MAGIC = b"GGUF"


def check_gguf(path: Path) -> None:
    """Refuse a file that is missing or is no GGUF file, or if the package gguf is missing.

    Raises:
        ModelError: the file is missing, empty, or does not start with the bytes ``GGUF``.
        ConfigError: the package gguf is not installed.
    """
    if not path.is_file():
        raise ModelError(f"model.name {str(path)!r}: there is no such file; check the path.")
    with path.open("rb") as stream:
        start = stream.read(4)
    if start != _MAGIC:
        raise ModelError(
            f"model.name {str(path)!r}: not a GGUF file (it starts with {start!r} instead of "
            f"{_MAGIC!r}); download it again or check the path."
        )
    try:
        import gguf  # noqa: F401 - only to see whether it is installed
    except ImportError:
        raise ConfigError(
            f"model.name {str(path)!r} is a GGUF file, which needs the package gguf: "
            "pip install 'rotmole[train]'."
        ) from None


def gguf_arguments(path: Path) -> dict[str, Any]:
    """Return arguments with which from_pretrained reads the file into ordinary dense weights.

    Returns:
        Keyword arguments to add to those of the model's ``from_pretrained(path.parent, ...)``.
    """
    import transformers

    arguments: dict[str, Any] = {"gguf_file": path.name}
    if hasattr(transformers, "GgufConfig"):  # older releases always dequantise
        # otherwise the model counts as quantised and can be neither trained nor saved
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return arguments


def make_ordinary(model: Any) -> None:
    """Clear the quantisation flags of a model and tie its embeddings again, in place.

    Args:
        model: read from a GGUF file with `gguf_arguments`.
    """
    model.is_quantized = False
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method")):
        if name in vars(owner):
            delattr(owner, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    source, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is source.weight or head.weight.shape != source.weight.shape:
        return
    if torch.equal(head.weight, source.weight):
        model.config.tie_word_embeddings = True
        head.weight = source.weight
