"""Kernels compiled ahead of time: which tensors one package serves, and what is kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rotmole.ops import packages
from rotmole.ops.packages import PACKAGES, Packages, TooManyLayoutsError

Given = Sequence[Tensor | None]
LETTERS = ["TD", "ED", "TE"]


def gated(tensors: Given) -> tuple[Tensor | int | None, ...]:
    """Two tensors, one that may not be there, and a constant."""
    x_TD, weight_ED, gate_TE = tensors
    assert x_TD is not None
    assert weight_ED is not None
    y_TE = x_TD @ weight_ED.mT
    product = None if gate_TE is None else (y_TE * gate_TE).sum(0)
    return y_TE.relu(), product, 7


def given(tokens: int, inputs: int, gate: bool = True, dtype: Any = torch.float64) -> list[Any]:
    torch.manual_seed(tokens)
    x_TD, weight_ED = torch.randn(tokens, inputs, dtype=dtype), torch.randn(3, inputs, dtype=dtype)
    return [x_TD, weight_ED, torch.rand(tokens, 3, dtype=dtype) if gate else None]


def compare(fast: Packages, tensors: Given) -> None:
    wanted, found = gated(tensors), fast(tensors)
    assert len(found) == len(wanted)
    for one, other in zip(wanted, found, strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
        else:
            assert other == one


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what torch traced, without its compiler."""

    def exported(program: Any) -> Callable[[list[Tensor]], list[Tensor]]:
        run = program.module()
        return lambda given: [*run(*given)]

    monkeypatch.setattr(packages, "_load", exported)


@pytest.mark.usefixtures("followed")
def test_free_dimensions_need_one_package() -> None:
    """Also where a number of tokens is by chance that of experts or of inputs."""
    fast = Packages(gated, LETTERS)
    for tokens, inputs in ((5, 5), (3, 4), (4, 4), (5, 7), (300, 2)):
        compare(fast, given(tokens, inputs))
    assert len(fast.made) == 1


@pytest.mark.usefixtures("followed")
def test_what_else_differs_needs_a_package_of_its_own() -> None:
    """One token, one input, another type, a tensor that is not there; each is then known."""
    fast = Packages(gated, LETTERS)
    cases = [given(5, 4), given(1, 4), given(5, 1), given(5, 4, False)]
    cases.append(given(5, 4, dtype=torch.float32))
    for count, tensors in enumerate(cases, start=1):
        assert [tensor.dtype for tensor in fast(tensors) if isinstance(tensor, Tensor)] == [
            tensors[0].dtype
        ] * (1 if tensors[2] is None else 2)
        assert len(fast.made) == count
    for tensors in cases[:4]:
        compare(fast, tensors)
    assert len(fast.made) == len(cases)


@pytest.mark.usefixtures("followed")
def test_memory_in_another_order_is_read_right() -> None:
    """A transposed tensor has a package of its own; one with gaps, or expanded, is copied."""
    fast = Packages(gated, LETTERS)
    x_TD, weight_ED, gate_TE = given(6, 4)
    compare(fast, [x_TD, weight_ED, gate_TE])
    compare(fast, [x_TD, weight_ED, gate_TE.mT.contiguous().mT])
    assert len(fast.made) == 2
    compare(fast, [torch.randn(12, 8, dtype=torch.float64)[::2, ::2], weight_ED, gate_TE])
    compare(fast, [x_TD, weight_ED, torch.rand(1, 3, dtype=torch.float64).expand(6, 3)])
    assert len(fast.made) == 2


@pytest.mark.usefixtures("followed")
def test_a_dimension_that_is_not_free_is_never_taken_for_another() -> None:
    fast = Packages(gated, LETTERS)
    compare(fast, given(5, 4))
    x_TD, _, _ = given(5, 4)
    compare(fast, [x_TD, torch.randn(2, 4, dtype=torch.float64), None])
    compare(fast, [x_TD, torch.randn(2, 4, dtype=torch.float64), torch.rand(5, 2).double()])
    assert len(fast.made) == 3


@pytest.mark.usefixtures("followed")
def test_ever_new_layouts_are_refused() -> None:
    fast = Packages(gated, LETTERS)
    x_TD = torch.ones(5, 4)
    for experts in range(1, PACKAGES + 1):
        fast([x_TD, torch.ones(experts, 4), None])
    with pytest.raises(TooManyLayoutsError, match=f"over {PACKAGES} ways"):
        fast([x_TD, torch.ones(PACKAGES + 1, 4), None])
    assert fast([x_TD, torch.ones(2, 4), None])[0].shape == (5, 2)


@pytest.mark.usefixtures("followed")
def test_what_is_remembered_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "SEEN", 3)
    fast = Packages(gated, LETTERS)
    for tokens in range(2, 12):
        compare(fast, given(tokens, 4))
        assert len(fast.seen) <= 3
    assert len(fast.made) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_kernels_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one loads them; a damaged file is made anew, and nothing is left beside it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compile_, made = torch._inductor.aoti_compile_and_package, []

    def once(program: Any, package_path: str) -> Any:
        """Compile the first time; then only write what was made."""
        if not made:
            compile_(program, package_path=package_path)
        made.append(made[0] if made else Path(package_path).read_bytes())
        return Path(package_path).write_bytes(made[-1])

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", once)
    for tokens in (5, 9):
        compare(Packages(gated, LETTERS), given(tokens, 4))
    assert len(made) == 1
    (path,) = (tmp_path / "rotmole").iterdir()
    path.write_bytes(made[0][: len(made[0]) // 2])
    compare(Packages(gated, LETTERS), given(5, 4))
    assert len(made) == 2
    assert [*(tmp_path / "rotmole").iterdir()] == [path]
    torch.set_num_threads(threads := torch.get_num_threads() + 1)
    try:
        assert Packages(gated, LETTERS)(given(5, 4))[2] == 7
    finally:
        torch.set_num_threads(threads - 1)
    assert len(made) == 3  # kernels are made for a number of threads
