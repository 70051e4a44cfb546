"""A function compiled ahead of time for CPUs: torch.export traces it, AOTInductor makes kernels.

torch.compile asks at each call whether its code still fits, which on a CPU takes longer than the
kernels of a small layer. Here a call looks up the shapes, strides and types of its tensors, and
only what was not seen before is compared with what was compiled.

Packages are kept on disk where torch keeps its own kernels, so that the next process loads them.
They use as many threads as torch did when they were made.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[[Sequence[Tensor | None]], tuple[Any, ...]]
Run = Callable[[list[Tensor]], list[Tensor]]
Layout = tuple[tuple[Any, ...] | None, ...]
"""(shape, strides, type) of each tensor, or None."""

FREE = "TDON"
"""Letters of the dimensions that may differ from call to call: tokens, inputs, outputs, numbers."""
PACKAGES = 8
"""Ways to lay out its tensors for which a function is compiled."""
SEEN = 4096
"""Layouts that are remembered, as many as numbers of tokens in most runs."""
_ONE_AT_A_TIME = threading.RLock()  # torch traces in one thread


class TooManyLayoutsError(RuntimeError):
    """A function is called with tensors that are laid out in ever new ways."""


class Packages:
    """A function of tensors, compiled anew for tensors that no earlier package fits.

    Args:
        function: pure, from a list of tensors and None to a tuple of tensors, None and constants.
        letters: one for each dimension of each tensor; those in FREE may differ from call to call.
    """

    def __init__(self, function: Function, letters: Sequence[str]) -> None:
        self.function = function
        self.letters = letters
        self.made: list[_Package] = []
        self.seen: dict[Layout, _Package] = {}

    def __call__(self, tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """Return what the function returns; autograd does not follow."""
        tensors = [None if tensor is None else _laid(tensor) for tensor in tensors]
        layout = tuple(
            None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)
            for tensor in tensors
        )
        package = self.seen.get(layout)
        if package is None:
            with _ONE_AT_A_TIME:
                package = self._find(tensors, layout)
        return package([tensor for tensor in tensors if tensor is not None])

    def _find(self, tensors: Sequence[Tensor | None], layout: Layout) -> _Package:
        package = next((package for package in self.made if package.fits(layout)), None)
        if package is None:
            if len(self.made) >= PACKAGES:
                raise TooManyLayoutsError(f"its tensors are laid out in over {PACKAGES} ways")
            package = _Package(self.function, self.letters, tensors)
            self.made.append(package)
        if len(self.seen) >= SEEN:
            self.seen = {}
        self.seen[layout] = package
        return package


def _laid(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy where its memory has gaps or an order of its own."""
    if tensor.is_contiguous() or (tensor.dim() > 1 and tensor.mT.is_contiguous()):
        return tensor
    return tensor.contiguous()


class _Package:
    """The kernels for tensors of one layout, but for the dimensions that are free."""

    def __init__(
        self, function: Function, letters: Sequence[str], tensors: Sequence[Tensor | None]
    ) -> None:
        there = [tensor is not None for tensor in tensors]
        self.results: list[Any] = []  # of the function, with _TENSOR in place of a tensor

        def follow(*given: Tensor) -> list[Tensor]:
            left = iter(given)
            results = function([next(left) if is_there else None for is_there in there])
            self.results = [_TENSOR if isinstance(each, Tensor) else each for each in results]
            return [each for each in results if isinstance(each, Tensor)]

        given = tuple(tensor.detach() for tensor in tensors if tensor is not None)
        names = [name for name, is_there in zip(letters, there, strict=True) if is_there]
        free = tuple(
            {
                i: torch.export.Dim.AUTO
                for i, (letter, size) in enumerate(zip(name, tensor.shape, strict=True))
                if letter in FREE and size > 1
            }
            for name, tensor in zip(names, given, strict=True)
        )
        program = torch.export.export(_Traced(follow), given, dynamic_shapes=(free,), strict=False)
        nodes = (node for node in program.graph.nodes if node.op == "placeholder")
        self.layout = [_layout(next(nodes).meta["val"]) if is_there else None for is_there in there]
        self.ranges = {
            symbol: (limits.lower, limits.upper)
            for symbol, limits in program.range_constraints.items()
        }
        self.run = _load(program)

    def fits(self, layout: Layout) -> bool:
        """Say whether the kernels are right for tensors of this layout."""
        pairs: list[tuple[Any, int]] = []
        for ours, found in zip(self.layout, layout, strict=True):
            if ours is None or found is None:
                if ours is not found:
                    return False
                continue
            (sizes, strides, dtype), (shape, steps, other) = ours, found
            if dtype != other or len(sizes) != len(shape):
                return False
            pairs += zip(sizes, shape, strict=True)
            # a dimension of one element has any stride
            pairs += [(s, n) for s, n, size in zip(strides, steps, shape, strict=True) if size != 1]
        known = {size: number for size, number in pairs if getattr(size, "is_Symbol", False)}
        if any(_number(size, known) != number for size, number in pairs):
            return False
        return all(low <= known[s] <= high for s, (low, high) in self.ranges.items() if s in known)

    def __call__(self, given: list[Tensor]) -> tuple[Any, ...]:
        made = iter(self.run(given))
        return tuple(next(made) if result is _TENSOR else result for result in self.results)


_TENSOR = object()


class _Traced(nn.Module):
    """A function as the module that torch.export wants."""

    def __init__(self, function: Callable[..., list[Tensor]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *given: Tensor) -> list[Tensor]:
        """Return the function's results."""
        return self.function(*given)


def _layout(value: Tensor) -> tuple[list[Any], list[Any], torch.dtype]:
    """Return sizes and strides as integers and sympy's expressions, and the type."""
    sizes, strides = (
        [n.node.expr if isinstance(n, torch.SymInt) else n for n in numbers]
        for numbers in (value.shape, value.stride())
    )
    return sizes, strides, value.dtype


def _number(size: Any, known: dict[Any, int]) -> Any:
    return size if isinstance(size, int) else size.xreplace(known)


def _load(program: torch.export.ExportedProgram) -> Run:
    """Load the kernels of a program from disk, compiled before if they are not there."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    path = Path(cache_dir()) / "rotmole" / f"{_digest(program)}.pt2"
    if path.exists():
        with suppress(RuntimeError):  # damaged: it is made anew
            return _runner(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        torch._inductor.aoti_compile_and_package(program, package_path=str(made))
        run = _runner(made)
        made.replace(path)
    return run


def _runner(path: Path) -> Run:
    run: Run = torch._inductor.aoti_load_package(str(path)).loader.boxed_run
    return run


def _digest(program: torch.export.ExportedProgram) -> str:
    """Return a name for what the kernels depend on: the program, torch, and the processor."""
    from torch._inductor import config

    values = [node.meta.get("val") for node in program.graph.nodes]
    settings = config.save_config_portable()
    settings.pop("aot_inductor.metadata", None)  # torch fills it in when it compiles
    parts = (
        program.graph_module.code, values, program.constants, program.range_constraints,
        torch.__version__, sorted(settings.items()), _processor(), torch.get_num_threads(),
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _processor() -> str:
    # older torch knows only the widest instructions
    known = getattr(torch.cpu, "get_capabilities", torch.backends.cpu.get_cpu_capability)
    return str(known())
