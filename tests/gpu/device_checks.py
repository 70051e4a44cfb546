"""What holds on the CPU holds on a GPU: laws, ways to compute, compiler and attention.

`make gpu` runs this file with pytest (tests/gpu/lane.py); the variable ROTMOLE_DEVICE names the
device, and `cpu` is the dry run. Everything is compared with float64 on the CPU: the slow loops of
ops/reference where the layer is small, the model itself where it is not.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from ops_cases import (
    CONDITIONAL,
    FAST,
    IN_RANK_SPACE,
    ROTATING,
    SLOW,
    VARIANTS,
    Problem,
    Variant,
    assert_close,
    make,
)
from peft import get_peft_model
from test_fused import FUSED, by_reference, how_of, leaves, router_of
from test_fused import run as run_fused
from test_grouped import GROUPED
from test_grouped import run as run_grouped
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import tiny
from rotmole import RotMoleConfig
from rotmole.inspection.laws import check_laws

DEVICE = torch.device(os.environ.get("ROTMOLE_DEVICE", "cpu"))
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
LARGER = {torch.float32: 50, torch.bfloat16: 20, torch.float16: 20}  # units of rounding allowed

# torch's compiler uses what torch itself deprecates, and says how it could be faster
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:TensorFloat32 tensor cores",
    r"ignore:\s*Online softmax is disabled",
)  # fmt: skip
every_format = pytest.mark.parametrize("dtype", FORMATS, ids=lambda d: str(d)[6:])


def rounded(variant: Variant, dtype: torch.dtype, seed: int = 8) -> Problem:
    """A float64 problem of numbers that the format has.

    Gates are a tenth as large: the error of an angle is its size times the format's rounding.
    """
    exact = make(variant, seed, T=6, E=3, K=2, D=8, O=8)
    return exact.map(lambda n, t: (t * 0.1 if n in exact.gates else t).to(dtype).double()).leaves()


def moved(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same problem on the device, in a format."""
    there = problem.map(lambda _, t: t.detach().to(DEVICE, dtype).requires_grad_())
    there.keep_TD = problem.keep_TD.to(DEVICE)
    return there


def gradients(y: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed random functional, on the CPU."""
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.autograd.grad((y * probe.to(y)).sum(), list(inputs.values()), allow_unused=True,
                                materialize_grads=True)  # fmt: skip
    return {name: grad.cpu().double() for name, grad in zip(inputs, found, strict=True)}


def assert_near(
    found: tuple[Tensor, dict[str, Tensor]],
    wanted: tuple[Tensor, dict[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    """Compare an output on the device, and the gradients of its inputs, with float64's."""
    y, inputs = found
    assert y.device.type == DEVICE.type
    assert y.dtype == dtype
    tolerance = LARGER[dtype] * torch.finfo(dtype).eps
    assert_close(y.cpu().double(), wanted[0], tolerance, "y")
    ours, theirs = gradients(y, inputs), gradients(*wanted)
    for name, grad in theirs.items():
        assert_close(ours[name], grad, 2 * tolerance, name)


@every_format
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_dense_is_the_slow_loops(variant: Variant, dtype: torch.dtype) -> None:
    exact = rounded(variant, dtype)
    there = moved(exact, dtype)
    found, wanted = (there.run(FAST), there.tensors()), (exact.run(SLOW), exact.tensors())
    assert_near(found, wanted, dtype)


@every_format
@pytest.mark.parametrize("variant", GROUPED, ids=str)
def test_grouped_is_the_slow_loops(variant: Variant, dtype: torch.dtype) -> None:
    exact = rounded(variant, dtype)
    there = moved(exact, dtype)
    found, wanted = (run_grouped(there), there.tensors()), (exact.run(SLOW), exact.tensors())
    assert_near(found, wanted, dtype)


@every_format
@pytest.mark.parametrize("variant", FUSED, ids=str)
def test_fused_is_the_slow_loops(variant: Variant, dtype: torch.dtype) -> None:
    """Routing, rotation and the base's output in one function, with dropout."""
    exact = rounded(variant, dtype)
    there = moved(exact, dtype)
    router = router_of(exact).detach().to(dtype).double().requires_grad_()
    router_there = router.detach().to(DEVICE, dtype).requires_grad_()
    keep = exact.keep_TD > 0
    y, _ = run_fused(how_of(there), there, router_there, keep.to(DEVICE))
    slow, _ = by_reference(how_of(exact), exact, router, keep)
    assert_near((y, leaves(there, router_there)), (slow, leaves(exact, router)), dtype)


@every_format
@pytest.mark.parametrize("variant", IN_RANK_SPACE, ids=str)
def test_rotations_keep_lengths(variant: Variant, dtype: torch.dtype) -> None:
    """Law 1; z and z' are in at least float32 in every format."""
    z, turned = moved(rounded(variant, dtype), dtype).rotated()
    assert turned.dtype == torch.float32
    assert torch.isfinite(turned).all()
    if variant in ROTATING and variant.rotation not in CONDITIONAL and not variant.metric:
        assert_close(turned.norm(dim=-1), z.norm(dim=-1), 1e-5)


@every_format
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gates_at_zero_are_no_rotation(variant: Variant, dtype: torch.dtype) -> None:
    """Law 3, up to the order of sums, which a GPU's products choose by shape."""
    start = moved(make(variant, 30, T=65, E=4, K=2, R=8, D=192, O=160), dtype).at_zero_start()
    tolerance = LARGER[dtype] * torch.finfo(dtype).eps
    assert_close(start.run(), start.without_rotation().run(), tolerance)


@every_format
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_gradient_is_a_tensor(variant: Variant, dtype: torch.dtype) -> None:
    """Law 7: also of experts that no token chose, and of no tokens at all."""
    for tokens in (3, 0):
        problem = moved(make(variant, 11, T=3, E=4, K=1, D=5, O=6), dtype)
        problem = problem.map(lambda n, t, k=tokens: t[:k] if n in ("x", "logits") else t).leaves()
        y = problem.run()
        y.sum().backward()
        for name, tensor in problem.tensors().items():
            assert tensor.grad is not None, name
            assert torch.isfinite(tensor.grad).all(), name


@pytest.mark.parametrize("dtype", FORMATS[1:], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("variant", IN_RANK_SPACE, ids=str)
def test_autocast_rounds_products_alone(variant: Variant, dtype: torch.dtype) -> None:
    problem = moved(rounded(variant, torch.float32), torch.float32)
    plain = problem.run()
    with torch.autocast(DEVICE.type, dtype=dtype):
        y = problem.run()
        _, turned = problem.rotated()
    assert turned.dtype == torch.float32
    assert_close(y.float(), plain, LARGER[dtype] * torch.finfo(dtype).eps)


def adapted(base: nn.Module, **settings: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(base, RotMoleConfig(init_weights=False, **settings))


@every_format
@pytest.mark.parametrize("rotation", ["tangent", "plane"])
def test_a_models_rows_keep_the_laws(rotation: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Those of docs/laws.md: other rows, padding, cache, later tokens, disabling, reloading."""

    def load() -> Any:
        return tiny.llama(num_hidden_layers=1).eval().to(DEVICE, dtype)

    settings = {"r": 4, "num_experts": 4, "task_type": "CAUSAL_LM", "rotation": rotation}
    model = adapted(load(), target_modules=["q_proj", "v_proj"], **settings)
    model.save_pretrained(tmp_path)
    report = check_laws(load, tmp_path)
    assert report.seen
    assert report.device.type == DEVICE.type
    broken = {f.law.name: (f.difference, f.tolerance, f.error) for f in report.findings
              if not f.kept}  # fmt: skip
    assert not broken


def one_step(run: Callable[..., Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and every gradient of one forward and backward pass, on the CPU."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = run(x)
    y.float().square().mean().backward()
    learns = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {n: t.detach().cpu().double() for n, t in ({"y": y, "x": x.grad} | learns).items()}


def layer(dtype: torch.dtype, **settings: Any) -> tuple[nn.Module, Tensor]:
    """A layer of usual width on the device, and rows of tokens."""
    torch.manual_seed(0)
    model = adapted(nn.Sequential(nn.Linear(256, 384)), target_modules=["0"], **settings)
    x = torch.randn(4, 64, 256, generator=torch.Generator().manual_seed(2))
    return model.to(DEVICE, dtype), x.to(DEVICE, dtype)


@every_format
@pytest.mark.parametrize("dispatch", ["fused", "grouped"])
@pytest.mark.parametrize("rotation", ["none", "tangent", "plane", "givens"])
def test_a_layer_is_float64_on_the_cpu(rotation: str, dispatch: str, dtype: torch.dtype) -> None:
    """With the balance loss, which has no effect on the output and adds to the gradients."""
    model, x = layer(dtype, r=8, num_experts=8, top_k=2, rotation=rotation, dispatch=dispatch,
                     router_aux_loss_coef=0.1)  # fmt: skip
    exact = copy.deepcopy(model).cpu().double()
    ours, theirs = one_step(model, model, x), one_step(exact, exact, x.cpu().double())
    for name, wanted in theirs.items():
        # where two experts score nearly alike rounding decides: few tokens, so the mean is judged
        apart = (ours[name] - wanted).abs().mean() / wanted.abs().mean()
        assert apart <= LARGER[dtype] * torch.finfo(dtype).eps, (name, float(apart))


@pytest.mark.parametrize("dtype", FORMATS[:2], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rotation", ["none", "tangent"])
def test_compiled_is_eager(rotation: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model, x = layer(dtype, r=4, num_experts=4, rotation=rotation, router_aux_loss_coef=0.1)
    eager = one_step(model, model, x)
    torch._dynamo.utils.counters.clear()
    compiled = one_step(torch.compile(model, fullgraph=True), model, x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for name, wanted in eager.items():
        apart = (compiled[name] - wanted).abs().mean() / wanted.abs().mean()
        assert apart <= LARGER[dtype] * torch.finfo(dtype).eps, (name, float(apart))


@every_format
@pytest.mark.parametrize("rotation", ["none", "tangent", "plane", "givens"])
def test_kernels_are_the_operations(rotation: str, dtype: torch.dtype) -> None:
    settings = {"r": 4, "num_experts": 4, "rotation": rotation, "router_aux_loss_coef": 0.1}
    model, x = layer(dtype, **settings)
    fast, _ = layer(dtype, kernels="compiled", **settings)
    eager, found = one_step(model, model, x), one_step(fast, fast, x)
    for name, wanted in eager.items():
        apart = (found[name] - wanted).abs().mean() / wanted.abs().mean()
        assert apart <= LARGER[dtype] * torch.finfo(dtype).eps, (name, float(apart))


def backends() -> list[str]:
    """Name the ways to compute attention that this device has in bfloat16."""
    usable = []
    q = torch.randn(2, 4, 16, 64, device=DEVICE, dtype=torch.bfloat16)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                    SDPBackend.CUDNN_ATTENTION):  # fmt: skip
        try:
            with sdpa_kernel(backend):
                scaled_dot_product_attention(q, q, q, is_causal=True)
        except RuntimeError:  # torch's word for a kernel that is not there
            continue
        usable.append(backend.name)
    return usable


def wide_llama(attention: str, key_heads: int) -> Any:
    """A small model whose heads are as wide as flash attention wants them."""
    return tiny.llama(hidden_size=128, num_attention_heads=2, num_key_value_heads=key_heads,
                      attn_implementation=attention)  # fmt: skip


def loss_and_gradients(
    attention: str, key_heads: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """One pass of the adapted model, rows of one length; all experts, so no choice can differ."""
    settings = {"r": 4, "num_experts": 4, "top_k": 4,
                "target_modules": ["q_proj", "v_proj", "down_proj"]}  # fmt: skip
    base = wide_llama(attention, key_heads).to(DEVICE, torch.bfloat16).to(dtype)
    model = adapted(base, router_aux_loss_coef=0.1, **settings)
    ids = tiny.tokens(2, 32).to(DEVICE)
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    learns = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {n: t.detach().cpu().double() for n, t in ({"loss": loss} | learns).items()}


def ways() -> list[str]:
    """Name every way; flash-attn is a package of its own, which runs on a GPU alone."""
    own = find_spec("flash_attn") is not None and DEVICE.type == "cuda"
    return [*backends(), *(["flash_attention_2"] if own else [])]


@pytest.mark.parametrize("way", ways())
def test_attention_kernels_agree_with_the_plain_one(way: str) -> None:
    # torch's memory-efficient kernel does not share a key head between query heads
    key_heads = 2 if way == SDPBackend.EFFICIENT_ATTENTION.name else 1
    with sdpa_kernel(SDPBackend.MATH):
        exact = loss_and_gradients("sdpa", key_heads, torch.float32)
        plain = loss_and_gradients("sdpa", key_heads)
    if way == "flash_attention_2":
        other = loss_and_gradients(way, key_heads)
    else:
        with sdpa_kernel(getattr(SDPBackend, way)):
            other = loss_and_gradients("sdpa", key_heads)
    for name, wanted in exact.items():
        size = wanted.abs().mean()
        rounding, apart = ((each[name] - wanted).abs().mean() / size for each in (plain, other))
        assert apart <= max(2 * rounding, 0.1), (name, float(apart), float(rounding))
