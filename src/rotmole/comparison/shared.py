"""What the runs of one process share: the base model, and the rows of each seed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rotmole.config.schema import ModelSection, RunFile
from rotmole.models.load import LoadedModel
from rotmole.training.build import ExamplesBySplit, Sources
from rotmole.training.start import draw_by_layer


class SharedSources(Sources):
    """Loads the base model and the rows once, and gives every run a model of its own.

    The modules of that model are copies; its weights are the same tensors, which no adapter
    changes. Those that do (trained biases, weights that an initialisation moves) are noticed by a
    checksum before the next run, and the model is loaded anew. A quantised model, or one spread by
    device_map, is loaded for every run.
    """

    def __init__(self, *, trust_remote_code: bool = False) -> None:
        super().__init__(trust_remote_code=trust_remote_code)
        self._section: ModelSection | None = None
        self._loaded: LoadedModel | None = None
        self._sum, self._weights = 0, 0
        self._rows: dict[tuple[int, str, str], ExamplesBySplit] = {}

    def model(self, section: ModelSection, say: Callable[[str], None]) -> LoadedModel:
        """Return the base model, of which only the modules may be changed."""
        if section.quantization != "none" or section.device_map is not None:
            return super().model(section, say)
        loaded = self._loaded
        if loaded is None or section != self._section or _checksum(loaded.model) != self._sum:
            self._loaded = None  # not two at a time
            loaded = super().model(section, say)
            self._loaded, self._section = loaded, section
            self._sum = _checksum(loaded.model)
            self._weights = _checksum(loaded.model, buffers=False)
        tensors = [*loaded.model.parameters(), *loaded.model.buffers()]
        model = copy.deepcopy(loaded.model, {id(tensor): tensor for tensor in tensors})
        return LoadedModel(model, loaded.tokenizer, loaded.name, loaded.note)

    @property
    def base_weights(self) -> str | None:
        """A checksum of the base model's weights; None where it is loaded for every run.

        Buffers are not in it: they are computed, and processors round differently.
        """
        return None if self._loaded is None else f"{self._weights % 2**48:012x}"

    def examples(self, run: RunFile, tokenizer: Any, date: str) -> ExamplesBySplit:
        """Return the rows of a seed; they are never changed."""
        key = run.seed, date, run.data.model_dump_json()
        if key not in self._rows:
            self._rows = {key: super().examples(run, tokenizer, date)}
        return self._rows[key]

    def adapted(self, run: RunFile, base: Any, *, resumes: bool) -> Any:
        """Put the adapter on; methods start alike where their shapes agree."""
        model = super().adapted(run, base, resumes=resumes)
        if not run.experts_from.paths and run.init_from is None:
            draw_by_layer(model, run.seed)
        return model


def _checksum(model: nn.Module, *, buffers: bool = True) -> int:
    """Return the sum of the bits of all weights, as integers, each tensor by its place."""
    total = 0
    tensors = [*model.parameters(), *(model.buffers() if buffers else ())]
    for place, tensor in enumerate(tensors):
        kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = tensor.detach().contiguous().view(kind[tensor.element_size()])
        total += (place + 1) * int(bits.sum(dtype=torch.int64))
    return total
