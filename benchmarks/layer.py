"""Does one adapted layer cost what LoRA costs? Time of forward and backward, and memory kept.

    python benchmarks/layer.py [--full] [--quick] [--csv FILE]

The baseline is unchanged PEFT LoRA with as many trainable parameters (gates counted); LoRA in five
lines of plain torch is measured too. x requires a gradient, as inside a network. There are three
figures: the step with the frozen base layer, the same with the base's own step subtracted, and the
step around a base layer that costs nothing, which is less noisy than a difference. On a machine
without fast bfloat16 products, the bfloat16 cases are only float32 adapters around a free base and,
with --full, the smallest layer with its base, which takes a second for each step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import (
    SHAPES,
    Row,
    adapter_config,
    alternate,
    finish,
    lora_like,
    lora_name,
    multiplies_halves,
    parser,
    ratio,
    run,
    saved_mib,
    show,
    spread,
    start,
)
from cost import Layer
from peft import get_peft_model
from torch import Tensor, nn

WIDTHS = ((1024, 1024, 1024), (512, 576, 1536))  # T, D, O
MODES = ("none", "tangent", "plane", "givens")
FURTHER = ("bias", "bivector", "radar")  # shown; radar is exempt from the targets
BALANCE = 0.01
SHARED = {"shared_expert_r": 8}
# type of the base and of x, autocast_adapter_dtype
TYPES = {
    "float32": (torch.float32, True),
    "bfloat16 with float32 adapters": (torch.bfloat16, True),
    "bfloat16 with bfloat16 adapters": (torch.bfloat16, False),
}


class Holder(nn.Module):
    """A network of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.proj = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Free(nn.Linear):
    """A base layer that costs nothing: its output is a tensor of zeros made beforehand."""

    zeros: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.zeros


class PlainLora(nn.Module):
    """LoRA in plain torch, the same numbers as PEFT's."""

    def __init__(self, base: nn.Module, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())

    def forward(self, x: Tensor) -> Tensor:
        low = torch.nn.functional.linear(x.to(self.A.dtype), self.A)
        y = self.base(x)
        return (y + torch.nn.functional.linear(low, self.B) * self.scale).to(y.dtype)


class Case:
    """One layer shape and type: makes models, and steps of them on one x."""

    def __init__(
        self,
        widths: tuple[int, int, int],
        shape: tuple[int, int, int],
        kind: str,
        slow: bool = False,
        device: str = "cpu",
    ) -> None:
        self.with_base = kind == "float32" or multiplies_halves() or slow
        self.tokens, self.inputs, self.outputs = widths
        self.shape, self.kind = shape, kind
        self.dtype, self.autocast = TYPES[kind]
        self.place = {"device": device, "dtype": self.dtype}
        self.x = torch.randn(4, self.tokens // 4, self.inputs).to(**self.place).requires_grad_()
        self.dy = torch.randn(4, self.tokens // 4, self.outputs).to(**self.place)

    def __str__(self) -> str:
        E, R, K = self.shape
        sizes = f"T={self.tokens} D={self.inputs} O={self.outputs} E={E} R={R} K={K}"
        return f"{sizes} {self.kind}"

    def base(self, free: bool = False) -> Holder:
        layer = (Free if free else nn.Linear)(self.inputs, self.outputs, bias=False)
        layer = layer.to(**self.place).requires_grad_(False)
        if free:
            layer.zeros = torch.zeros_like(self.dy)
        return Holder(layer)

    def ours(self, mode: str, free: bool = False, **more: Any) -> nn.Module:
        config = adapter_config(mode, self.shape, ["proj"], **more)
        return get_peft_model(self.base(free), config, autocast_adapter_dtype=self.autocast)

    def lora(self, ours: nn.Module, free: bool = False) -> nn.Module:
        base = self.base(free)
        return lora_like(ours, ["proj"], base, autocast_adapter_dtype=self.autocast)

    def step(self, model: nn.Module) -> Callable[[], None]:
        def forward_and_backward() -> None:
            model(self.x).backward(self.dy)
            model.zero_grad()
            self.x.grad = None

        return forward_and_backward

    def kept(self, model: nn.Module) -> float:
        return saved_mib(lambda: model(self.x), exclude=(model, self.x))

    def row(self, mode: str, measure: str, against: str, **figures: Any) -> Row:
        return show(Row("layer", str(self), mode, measure, against, **figures))


def plain(peft_lora: nn.Module, base: nn.Module) -> PlainLora:
    """Return plain torch LoRA with the weights of PEFT's, and check that they agree."""
    layer = peft_lora.base_model.model.proj
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    return PlainLora(base, A, B, layer.scaling["default"])


def measure(case: Case, modes: tuple[str, ...], rounds: int, balanced: tuple[str, ...]) -> list:
    """Measure all modes of one case in the same rounds."""
    fast = case.kind == "float32" or multiplies_halves()
    steps = {"base": case.step(case.base())} if case.with_base else {}
    names: dict[str, tuple[str, nn.Module, nn.Module]] = {}
    variants = [(mode, mode, {}) for mode in modes]
    variants += [(f"{m}, balance loss on", m, {"router_aux_loss_coef": BALANCE}) for m in balanced]
    variants += [(f"{m}, shared expert", m, SHARED) for m in balanced]
    variants += [
        (f"{name}, kernels compiled", mode, more | {"kernels": "compiled"})
        for name, mode, more in variants
        if mode in MODES
    ]
    if case.kind == "bfloat16 with float32 adapters" and fast:
        variants += [(f"{m}, compute_dtype input", m, {"compute_dtype": "input"}) for m in balanced]
    for name, mode, more in variants:
        ours, free = case.ours(mode, **more), case.ours(mode, free=True, **more)
        lora, free_lora = case.lora(ours), case.lora(free, free=True)
        names[name] = (lora_name(lora), free, free_lora)
        if case.with_base:
            steps[name] = case.step(ours)
            steps[lora_name(lora)] = case.step(lora)
        steps[f"{name} alone"] = case.step(free)
        steps[f"{lora_name(lora)} alone"] = case.step(free_lora)
        if fast and "plain" not in steps:
            steps["plain"] = case.step(plain(lora, case.base()))
    times = alternate(steps, rounds)
    rows = []
    for name, (baseline, free, free_lora) in names.items():
        figures = {"adapter path, free base": ratio(times, f"{name} alone", f"{baseline} alone")}
        if case.with_base:
            figures["step with base"] = ratio(times, name, baseline)
            figures["adapter path, base subtracted"] = ratio(times, name, baseline, less="base")
        rows += [case.row(name, what, baseline, **found) for what, found in figures.items()]
        mib = case.kept(free)
        sizes = {"low_10": mib, "high_90": mib, "unit": "MiB", "baseline": case.kept(free_lora)}
        rows.append(case.row(name, "saved for backward", "", value=mib, **sizes))
    if not fast:
        return rows
    first = names[modes[0]][0]
    rows.append(
        case.row(first, "PEFT LoRA, with base", "plain torch", **ratio(times, first, "plain"))
    )
    return rows + ceiling(case, modes, times, rounds)


def ceiling(case: Case, modes: tuple[str, ...], times: dict, rounds: int) -> list[Row]:
    """Say which share of the speed of one large product the adapter path reaches."""
    size = 2048 if case.tokens >= 1024 else 512
    left, right = (torch.randn(size, size).to(case.dtype) for _ in range(2))
    product = alternate({"product": lambda: left @ right}, rounds)["product"]
    peak = 2 * size**3 / min(product)
    E, R, K = case.shape
    rows = []
    for mode in modes:
        if mode in MODES:
            sizes = (case.tokens, case.inputs, case.outputs, E, K, R, mode)
            flops = Layer(*sizes).step_flops
            shares = [flops / seconds / peak for seconds in times[f"{mode} alone"]]
            value, low, high = spread(shares)
            found = {"value": value, "low_10": low, "high_90": high, "unit": "of 1"}
            what = "share of the GEMM ceiling, free base"
            rows.append(case.row(mode, what, "", **found, baseline=peak / 1e9, rounds=rounds))
    return rows


def compiled(case: Case, modes: tuple[str, ...], rounds: int) -> list[Row]:
    """Compare torch.compile of ours with torch.compile of PEFT LoRA, with base."""
    rows = []
    for mode in modes:
        torch._dynamo.reset()
        ours = case.ours(mode)
        lora = case.lora(ours)
        steps = {name: case.step(torch.compile(model, fullgraph=True, dynamic=False))
                 for name, model in (("ours", ours), ("lora", lora))}  # fmt: skip
        times = alternate(steps, rounds)
        found = ratio(times, "ours", "lora")
        rows.append(case.row(mode, "compiled step with base", lora_name(lora), **found))
    return rows


def cases(quick: bool, full: bool) -> list[tuple[Case, tuple[str, ...], tuple[str, ...]]]:
    """Return (case, modes, modes also measured with the balance loss and compute_dtype input).

    The usual cases are every shape in float32 and, in bfloat16 and in the other widths, one shape
    and two modes; `full` is all of them.
    """
    if quick:
        some = Case((64, 32, 48), SHAPES[0], "bfloat16 with float32 adapters")
        return [(some, (*MODES, *FURTHER), ("tangent",))]
    found = []
    few = ("none", "tangent")
    for widths in WIDTHS:
        for shape in SHAPES:
            for kind in TYPES:
                if kind == "bfloat16 with bfloat16 adapters" and not multiplies_halves():
                    continue
                main = widths == WIDTHS[0] and kind == "float32"
                if full:
                    small = (widths, shape) == (WIDTHS[1], SHAPES[0])
                    modes = (*MODES, *FURTHER) if kind == "float32" or multiplies_halves() else few
                    found.append((Case(widths, shape, kind, slow=small), modes, few))
                elif main:
                    found.append((Case(widths, shape, kind), MODES, few))
                elif shape == SHAPES[2] and (widths == WIDTHS[0] or kind == "float32"):
                    found.append((Case(widths, shape, kind), few, ("tangent",)))
    return found


def main() -> int:
    """Measure every case; print the rows, and write them if asked."""
    given = parser(__doc__).parse_args()
    start(given)
    rows: list[Row] = []
    for case, modes, balanced in cases(given.quick, given.full):
        rows += measure(case, modes, given.rounds, balanced)
    if given.quick:
        rows += compiled(Case((64, 32, 48), SHAPES[0], "float32"), ("none",), given.rounds)
    else:
        for shape in SHAPES if given.full else SHAPES[:1]:
            modes = MODES if given.full else ("tangent",)
            rows += compiled(Case(WIDTHS[0], shape, "float32"), modes, given.rounds)
    return finish(rows, given)


if __name__ == "__main__":
    run(main)
