"""Kernels in place of many small operations: torch's compilers for one pass of one kind of layer.

A kind is compiled once for every number of tokens, and once for a single one: on a CPU ahead of
time (packages.py), elsewhere by torch.compile. The code is kept on disk, so the next process only
loads it. Where there is no compiler (a C++ compiler on a CPU, Triton on a GPU), the operations are
run one by one, with one warning.

Without kernels, `few` says which calls are better off with fewer operations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from rotmole.ops.packages import Packages
from rotmole.ops.spec import Spec

Kind = TypeVar("Kind")
Pass = Callable[[Kind, Sequence[Tensor | None]], tuple[Any, ...]]

FEW_TOKENS = 64
"""Tokens up to which a layer's time is the number of its operations."""


def few(x_TD: Tensor) -> bool:
    """Say whether fewer operations are worth a little more memory: where tokens are few.

    Never under torch.compile, which makes its own kernels, for any number of tokens.

    >>> few(torch.ones(1, 3)), few(torch.ones(1000, 3))
    (True, False)
    """
    return not torch.compiler.is_compiling() and x_TD.shape[0] <= FEW_TOKENS


def may_compile(spec: Spec, x_TD: Tensor) -> bool:
    """Say whether a layer asks for kernels and this call can use them.

    It cannot where torch.compile sees the whole model, and where somebody looks at every operation.
    """
    if spec.kernels != "compiled" or not len(x_TD) or x_TD.is_meta:
        return False
    return not (torch.compiler.is_compiling() or is_in_torch_dispatch_mode())


class Kernels:
    """One function for one kind of layer, compiled when it is first called."""

    def __init__(self, function: Pass[Any], kind: Any, letters: Sequence[str], device: str) -> None:
        def step(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
            return function(kind, tensors)

        self.plain = step
        self.fast: Callable[..., tuple[Any, ...]] | None
        self.fast = Packages(step, letters) if device == "cpu" else _followed(step)

    def __call__(self, tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """Return what the function returns; autograd follows no tensor."""
        if self.fast is None:
            return self.plain(tensors)
        try:
            return self.fast(tensors)
        except Exception as error:
            result = self.plain(tensors)  # an error of the layer's own comes out here
            self.fast = None
            lines = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(
                f"kernels: compiled, but torch's compiler failed ({lines[0]}); the layer is "
                "computed operation by operation, with the same results",
                RuntimeWarning,
                stacklevel=2,
            )
            return result


def _followed(step: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    # code of its own: torch counts how often it compiles a piece of code, and stops at a few
    own = FunctionType(step.__code__.replace(), step.__globals__, closure=step.__closure__)
    fast = torch.compile(own, dynamic=True, fullgraph=True)
    return lambda tensors: fast([None if each is None else each.detach() for each in tensors])


_kernels = cache(Kernels)


def kernels_of(
    function: Pass[Kind], kind: Kind, letters: Sequence[str], tensors: Sequence[Tensor | None]
) -> Kernels:
    """Return what computes function(kind, tensors) by kernels that are made of it for each kind.

    Args:
        function: pure; returns tensors, None and constants.
        kind: hashable; what does not change from call to call.
        letters: one for each dimension of each tensor (packages.py), as its name ends.
        tensors: of which the first that is there says where all are.
    """
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    return _kernels(function, kind, tuple(letters), device)


def compiled(
    function: Pass[Kind], kind: Kind, tensors: Sequence[Tensor | None], letters: Sequence[str]
) -> tuple[Any, ...]:
    """Return function(kind, tensors) by the kernels of its kind; autograd follows no tensor."""
    return kernels_of(function, kind, letters, tensors)(tensors)


def letters_of(fields: Sequence[str]) -> tuple[str, ...]:
    """Return the letters for a tensor's dimensions that its name ends with.

    >>> letters_of(["x_TD", "few_NT"])
    ('TD', 'NT')
    """
    return tuple(field.rpartition("_")[2] for field in fields)
