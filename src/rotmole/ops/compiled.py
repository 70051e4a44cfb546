"""Kernels in place of many small operations: torch.compile for one pass of one kind of layer.

A kind is compiled once a process for every number of tokens, and once for a single one; torch keeps
the code on disk, so the next process only loads it. Where there is no compiler (a C++ compiler on a
CPU, Triton on a GPU), the operations are run one by one, with one warning.

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

from rotmole.ops.spec import Spec

Result = TypeVar("Result")


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


def detached(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the tensors apart from autograd, as `compiled` wants them."""
    return [None if tensor is None else tensor.detach() for tensor in tensors]


class _Kernels:
    """One function for one kind of layer, compiled when it is first called."""

    def __init__(self, function: Callable[..., Any], kind: Any) -> None:
        def step(*tensors: Any) -> Any:
            return function(kind, *tensors)

        # code of its own: torch counts how often it compiles a piece of code, and stops at a few
        own = FunctionType(step.__code__.replace(), step.__globals__, closure=step.__closure__)
        self.plain = step
        self.fast: Callable[..., Any] | None = torch.compile(own, dynamic=True, fullgraph=True)

    def __call__(self, *tensors: Any) -> Any:
        if self.fast is None:
            return self.plain(*tensors)
        try:
            return self.fast(*tensors)
        except Exception as error:
            result = self.plain(*tensors)  # an error of the layer's own comes out here
            self.fast = None
            lines = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(
                f"kernels: compiled, but torch.compile failed ({lines[0]}); the layer is computed "
                "operation by operation, with the same results",
                RuntimeWarning,
                stacklevel=2,
            )
            return result


_kernels = cache(_Kernels)


def compiled(function: Callable[..., Result], kind: Any, *tensors: Any) -> Result:
    """Return function(kind, *tensors), by kernels that are made of it for each kind.

    Args:
        function: pure, of tensors and sequences of tensors.
        kind: hashable; what does not change from call to call.
        tensors: none that autograd follows.
    """
    result: Result = _kernels(function, kind)(*tensors)
    return result
