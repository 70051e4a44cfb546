"""kernels: compiled. The compiled steps and the operations one by one agree, and nothing fails."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from ops_cases import Problem, Variant, assert_close, make
from test_fused import FUSED, gradients, how_of, leaves, router_of, run, weights_of
from torch.utils.flop_counter import FlopCounterMode

from rotmole.ops import compiled as module
from rotmole.ops import packages
from rotmole.ops.compiled import may_compile
from rotmole.ops.mixture.banks import How
from rotmole.ops.mixture.fused import can_compile, fused_mixture
from rotmole.ops.mixture.packed import pack, packed_mixture
from rotmole.ops.reference import method
from rotmole.ops.rotation.adjoint import BY_HAND
from rotmole.ops.routing.selection import _numbers_by_counting, top_k_of
from rotmole.ops.spec import Spec, Weights

COMPILED = [v for v in FUSED if can_compile(v.rotation)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.slow)])
def traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Let torch follow the steps as it does to compile them, without its compiler, and count.

    As on a CPU, where they are exported, and as elsewhere, by torch.compile.
    """
    made: list[Any] = []

    def exported(program: Any) -> Any:
        made.append(program)
        run = program.module()
        return lambda given: [*run(*given)]

    def followed(function: Any, **options: Any) -> Any:
        assert options == {"dynamic": True, "fullgraph": True}
        made.append(function)
        return torch_compile(function, backend="eager", **options)

    torch_compile = torch.compile
    monkeypatch.setattr(module, "_kernels", partial(_new, {}, request.param))
    monkeypatch.setattr(packages, "_load", exported)
    monkeypatch.setattr(torch, "compile", followed)
    yield made
    torch._dynamo.reset()


def _new(known: dict[Any, Any], device: str, *key: Any) -> Any:
    *key, own = key
    assert own == "cpu"
    if tuple(key) not in known:
        known[tuple(key)] = module.Kernels(*key, device)
    return known[tuple(key)]


def agree(how: How, problem: Problem, drops: bool, tolerance: float) -> None:
    """Compare outputs and all gradients with those of the operations one by one."""
    router_ED = router_of(problem).to(problem.x_TD.dtype).detach().requires_grad_()
    keep_TD = problem.keep_TD > 0 if drops else None
    inputs = leaves(problem, router_ED)
    outputs = []
    for kernels in ("eager", "compiled"):
        fast = run(
            how._replace(spec=replace(how.spec, kernels=kernels)), problem, router_ED, keep_TD
        )
        outputs.append((fast, gradients(fast, inputs)))
    (plain, plain_grads), (fast, fast_grads) = outputs
    for one, other in zip(plain, fast, strict=True):
        assert one is not None
        assert other is not None
        assert one.dtype == other.dtype
        assert_close(other, one, tolerance)
    for name, gradient in plain_grads.items():
        assert gradient.dtype == fast_grads[name].dtype
        assert_close(fast_grads[name], gradient, tolerance, name)


HEAVY = pytest.mark.heavy  # the ordinary lane follows one variant of each rotation
ORDINARY = [next(v for v in COMPILED if v.rotation == name) for name in BY_HAND]
OPTIONS = ({}, {"norm_topk_prob": False}, {"selection": "dense"})


@pytest.mark.parametrize(
    ("variant", "options", "drops"),
    [
        pytest.param(v, OPTIONS[i % 3], i % 2 == 1, marks=[] if v in ORDINARY else HEAVY)
        for i, v in enumerate(COMPILED)
    ],
    ids=str,
)
def test_followed_steps(
    variant: Variant, options: dict[str, Any], drops: bool, traced: list[Any]
) -> None:
    """Every number of tokens runs what was compiled for the first."""
    for seed, tokens in ((2, 3), (3, 5)):
        problem = make(variant, seed, T=tokens, E=4, K=2, D=5, O=6).leaves()
        agree(how_of(problem, **options), problem, drops, 1e-12)
    assert len(traced) == 2  # forward and back


# inductor uses what torch itself deprecates
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "rotation",
    ["tangent", *(pytest.param(r, marks=pytest.mark.heavy) for r in ("none", "plane", "givens"))],
)
def test_real_kernels(rotation: str) -> None:
    """By the compiler, at the numbers of tokens that it was not compiled for too."""
    variant = next(v for v in COMPILED if v.rotation == rotation and not v.input_z)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for tokens in (3, 7):
            problem = make(variant, 2, T=tokens, E=4, K=2, D=5, O=6).leaves()
            agree(how_of(problem), problem, False, 1e-12)


def test_half_types_and_a_shared_expert(traced: list[Any]) -> None:
    """Types in and out are those of the operations one by one."""
    torch.manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16).requires_grad_()

    shared = Spec(scoring="sigmoid", selection="dense", norm_topk_prob=False, rotation="tangent")
    spec = Spec(num_experts=4, top_k=2, rotation="tangent", scale=2.0, shared=shared)
    weights = Weights(
        normal(4, 3, 5), normal(4, 3, 6), {"rotation_vector": normal(4, 3, 5)},
        {"router_weight": normal(4, 5)},
        shared=Weights(
            normal(1, 2, 5), normal(1, 2, 6), {"rotation_vector": normal(1, 2, 5)},
            {"router_weight": normal(1, 5)},
        ),
    )  # fmt: skip
    x_TD, base_TO = normal(7, 5), normal(7, 6)
    inputs = [x_TD, base_TO, weights.A_ERD, weights.B_ERO, weights.gates["rotation_vector"]]
    inputs += [weights.router["router_weight"], weights.shared.A_ERD, weights.shared.B_ERO]
    inputs += [*weights.shared.gates.values(), *weights.shared.router.values()]
    sides = []
    for kernels in ("eager", "compiled"):
        how = How(replace(spec, kernels=kernels), torch.bfloat16)
        y_TO, logits_TE, index_KT = fused_mixture(how, x_TD, weights, base_TO=base_TO)
        total = (y_TO.float() ** 2).sum() + (logits_TE**2).sum()
        sides.append([y_TO, logits_TE, index_KT, *torch.autograd.grad(total, inputs)])
    assert len(traced) == 2
    assert torch.equal(sides[0].pop(2), sides[1].pop(2))  # numbers; eager, few have no small type
    for one, other in zip(*sides, strict=True):
        assert one.dtype == other.dtype
        assert_close(other.double(), one.double(), 3e-2)


@pytest.mark.parametrize("variant", ORDINARY, ids=str)
def test_packed_steps(variant: Variant, traced: list[Any], request: pytest.FixtureRequest) -> None:
    """A single token is compiled apart from more of them."""
    for tokens in (1, 3, 5):
        problem = make(variant, 2, T=tokens, E=4, K=2, D=5, O=6)
        how, weights = how_of(problem), weights_of(problem, router_of(problem).detach())
        sides = []
        for kernels in ("eager", "compiled"):
            spec = replace(how.spec, kernels=kernels)
            packed = pack(spec, [weights], torch.float64)
            sides.append(packed_mixture(problem.x_TD, packed))
        assert_close(sides[1], sides[0], 1e-12)
    assert len(traced) == (1 if request.node.callspec.params["traced"] == "cuda" else 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("experts", [2, 4, 9])
def test_counting_finds_what_sorting_finds(experts: int, compiles: bool) -> None:
    """Ties go to the lower number, and what is no number counts as the largest, as in a sort."""
    count = torch.compile(_numbers_by_counting) if compiles else _numbers_by_counting
    torch.manual_seed(experts)
    score_ET = torch.randint(0, 4, (experts, 200)).double()
    score_ET[0, ::7] = torch.inf
    score_ET[1, ::5] = torch.nan
    score_ET[0, ::35] = -torch.inf
    for k in range(1, experts + 1):
        found_KT = count(score_ET, k)
        if not score_ET[:, 1].isnan().any():
            wanted = method.best(score_ET[:, 1].tolist(), k)
            assert found_KT[:, 1].tolist() == wanted
        finite = score_ET.isfinite().all(0)
        assert torch.equal(found_KT[:, finite], top_k_of(score_ET, k)[1][:, finite])
        distinct = found_KT.sort(0).values.diff(dim=0)
        assert bool((distinct > 0).all()), "an expert is chosen twice"
        assert int(found_KT.min()) >= 0
        assert int(found_KT.max()) < experts


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_a_compiler_it_is_eager_with_one_warning(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*graph: Any) -> Any:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(module, "_kernels", partial(_new, {}, device))
    monkeypatch.setattr(packages, "_load", none)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=none))
    problem = make(COMPILED[0], 2, T=3, E=4, K=2, D=5, O=6).leaves()
    with pytest.warns(RuntimeWarning, match="torch's compiler failed") as said:
        agree(how_of(problem), problem, False, 0.0)
    assert len([w for w in said if "compiler failed" in str(w.message)]) == 2  # there and back
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        agree(how_of(problem), problem, False, 0.0)


# inductor uses what torch itself deprecates
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_threads_share_kernels(mode: Any) -> None:
    """All of them call at once, before anything is compiled, as a server's threads do."""
    problem = make(COMPILED[0], 2, T=9, E=4, K=2, D=5, O=6)
    how, weights = how_of(problem), weights_of(problem, router_of(problem).detach())
    module._kernels.cache_clear()

    def outputs(kernels: str) -> list[torch.Tensor]:
        fast = how._replace(spec=replace(how.spec, kernels=kernels))
        with mode():
            return [fused_mixture(fast, problem.x_TD[n:], weights)[0] for n in (0, 3, 0, 8, 7)]

    wanted = outputs("eager")
    with ThreadPoolExecutor(4) as pool, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for found in pool.map(outputs, ["compiled"] * 8):
            for one, other in zip(wanted, found, strict=True):
                assert_close(other, one, 1e-12)


def test_an_error_of_the_layer_is_its_own(traced: list[Any]) -> None:
    """It comes out as it is, and the kernels stay."""
    spec = Spec(num_experts=2, top_k=2, kernels="compiled")
    tensors = [torch.ones(2, 3), torch.ones(2, 3)]
    with pytest.raises(RuntimeError, match=r"size|shape"):
        module.compiled(lambda kind, both: (both[0] @ both[1],), spec, tensors, ["TD", "TD"])


def test_when_kernels_are_made() -> None:
    spec, x_TD = Spec(kernels="compiled"), torch.ones(2, 3)
    assert may_compile(spec, x_TD)
    assert not may_compile(Spec(), x_TD)
    assert not may_compile(spec, x_TD[:0])
    assert not may_compile(spec, x_TD.to("meta"))
    with FlopCounterMode(display=False):
        assert not may_compile(spec, x_TD)
