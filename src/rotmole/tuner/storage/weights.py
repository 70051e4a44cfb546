"""Stored weights: checked in the file, and again before a tensor reaches a layer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rotmole.errors import AdapterError
from rotmole.files import atomic_write_bytes
from rotmole.tuner.settings.settings import Settings

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
EXPERTS = ".rotmole_experts."
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""Number formats a weight may have: safetensors' name -> torch's."""
_LARGEST_HEADER = 100_000_000  # as in safetensors itself


class Entry(NamedTuple):
    """A tensor as a file's header describes it."""

    shape: tuple[int, ...]
    dtype: str


def refuse_pickle(folder: Path) -> None:
    """Refuse a folder whose only weights are a pickle; the file is not opened.

    Raises:
        AdapterError: there is adapter_model.bin and no adapter_model.safetensors.
    """
    if (folder / PICKLE).exists() and not (folder / WEIGHTS).is_file():
        raise AdapterError(
            f"{folder}: its weights are a pickle file ({PICKLE}), which can run code and is not "
            "opened; save the adapter as safetensors"
        )


def replace_pickle(folder: Path) -> None:
    """Write the weights of a pickle that was just saved as safetensors, and remove the pickle."""
    from safetensors.torch import save

    state = torch.load(folder / PICKLE, map_location="cpu", weights_only=True)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    atomic_write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    (folder / PICKLE).unlink()


def read_header(file: Path) -> dict[str, Entry]:
    """Read which tensors a safetensors file holds, without reading them.

    Returns:
        Name -> shape and number format.

    Raises:
        AdapterError: the file is damaged; names path, size and expected size.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 - no mapping
            return {
                name: Entry(tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        size, expected = file.stat().st_size, _expected_size(file)
        promised = f"its header promises {expected}" if expected else "it has no readable header"
        raise AdapterError(
            f"{file} is damaged ({size} bytes on disk, {promised}: {error}); copy or save it again"
        ) from error


def _expected_size(file: Path) -> int | None:
    """Return the length that a safetensors header promises, None where there is no such header."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= _LARGEST_HEADER:
            return None
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key[:2] != "__"]
            return 8 + length + int(max(ends, default=0))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return None


def header_problems(settings: Settings, header: Mapping[str, Entry]) -> list[str]:
    """Compare a file's header with the configuration beside it; no model is needed.

    Args:
        settings: the adapter's settings.
        header: from `read_header`.

    Returns:
        One sentence per problem.
    """
    problems = [
        f"tensor {name!r} is stored as {entry.dtype}; weights are {', '.join(FLOATS.values())}"
        for name, entry in header.items()
        if entry.dtype not in FLOATS
    ]
    factors = {name: entry.shape for name, entry in header.items() if name.endswith("expert_B")}
    if not factors:
        return [*problems, "it holds no tensor expert_B, so it is not an adapter of this method"]
    added = sum(settings.experts_added)  # they have tensors of their own
    allowed = {
        "num_experts": {count - added for count in _values(settings, "num_experts")},
        "r": _values(settings, "r", "rank_pattern"),
    }
    if settings.router_scope == "block":  # modules outside of feed-forward blocks have one
        allowed["num_experts"].add(1)
    for axis, (name, values) in enumerate(allowed.items()):
        problems += _other_sizes(name, values, axis, factors.values())
    shared = [entry.shape for name, entry in header.items() if name.endswith("shared_B")]
    if bool(shared) != (settings.shared_expert_r > 0):
        shared = shared or [(1, 0, 0)]
    return [*problems, *_other_sizes("shared_expert_r", {settings.shared_expert_r}, 1, shared)]


def _other_sizes(
    name: str, values: set[Any], axis: int, shapes: Iterable[tuple[int, ...]]
) -> Iterator[str]:
    """Yield how stored tensors differ in one size from what the settings allow."""
    odd = {shape[axis] if len(shape) == 3 else shape for shape in shapes} - values
    if odd:
        rule = " or ".join(str(value) for value in sorted(values))
        had = ", ".join(str(value) for value in sorted(odd, key=str))
        yield f"{name} is {rule} in adapter_config.json, the weights have {had}"


def _values(settings: Settings, name: str, pattern: str = "") -> set[Any]:
    """Return the values that a count has, its exceptions by module or depth included."""
    exceptions = getattr(settings, pattern or f"{name}_pattern", None) or {}
    listed = exceptions.values() if isinstance(exceptions, dict) else exceptions
    return {getattr(settings, name), *listed}


def value_problems(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Yield one sentence for each tensor that no layer may receive.

    Returns:
        Sentences about number formats, NaN and Inf, with their count.
    """
    for name, tensor in tensors:
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in FLOATS.values():
            yield f"tensor {name!r} is stored as {kind}; weights are {', '.join(FLOATS.values())}"
        elif type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta:
            wrong = int(tensor.numel() - torch.isfinite(tensor).sum())
            if wrong:
                yield f"tensor {name!r} holds {wrong} values that are NaN or infinite"


def check_state(
    expected: Mapping[str, tuple[int, ...]], names: set[str], state: Mapping[str, Tensor]
) -> None:
    """Check all tensors of one or more adapters before the first one is copied.

    Args:
        expected: names and shapes of the experts' tensors in the model.
        names: of all tensors of the model.
        state: what is about to be loaded; without a tensor of an adapter nothing is checked.

    Raises:
        AdapterError: tensors are missing, unknown, of other shapes or formats, or not finite.
    """
    ours = {name for name in state if EXPERTS in name}
    adapters = {_adapter_of(name) for name in ours & expected.keys()}
    if not ours:
        return
    missing = [
        n for n in expected if n not in state and (_adapter_of(n) in adapters or not adapters)
    ]
    whole_model = any(".base_layer." in name for name in state)
    unknown = sorted((ours - expected.keys()) if whole_model else (state.keys() - names))
    problems = [*_counted(missing, "missing"), *_counted(unknown, "unknown to this model")]
    present = {name: state[name] for name in sorted(ours & expected.keys())}
    problems += [
        f"tensor {name!r} has shape {tuple(tensor.shape)}, this model needs {expected[name]} "
        "(another rank, number of experts or base model)"
        for name, tensor in present.items()
        if tuple(tensor.shape) != expected[name]
    ]
    checked = present if whole_model else {name: state[name] for name in state.keys() & names}
    problems += value_problems(sorted(checked.items()))
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise AdapterError(
            f"the stored adapter does not fit, and nothing of it was loaded: "
            f"{'; '.join(problems[:4])}{more}. Save it again, or load it on its own base model."
        )


def _adapter_of(name: str) -> str:
    """Return the adapter's name in ``path.rotmole_experts.<adapter>.<parameter>``."""
    return re.split(re.escape(EXPERTS), name)[-1].partition(".")[0]


def _counted(names: list[str], what: str) -> Iterator[str]:
    """Yield how many tensors there are, if any, and the names of the first eight."""
    if names:
        listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        yield f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'} {what}: {listed}"
