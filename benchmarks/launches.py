"""How many operations does a small layer start, and what does that cost? Ours beside LoRA's.

    python benchmarks/launches.py [--originals DIR] [--quick] [--csv FILE]

With few tokens (T = 8 here, and one token without gradients) a layer's time is proportional to the
number of its operations, not to their size; on a GPU each is a kernel to launch. The eager count is
that of ATen operations, backward pass included, which make or fill a tensor: views and empty
tensors launch nothing and are left out. The compiled count is that of the kernels that inductor
generated and of the products that it calls; "operations and kernels" is the same of a layer with
`kernels: compiled`, which is not compiled as a whole. PEFT LoRA has as many parameters as ours in
each mode; its counts do not depend on its rank. The other systems are those of peers.py, at equal
outputs. The fixed cost is processor time: at this size nothing waits and nothing is spread over
cores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import process_time
from typing import Any

import torch
from common import (
    SHAPES,
    Row,
    alternate,
    finish,
    lora_name,
    parser,
    ratio,
    run,
    show,
    start,
)
from decode import decoder
from layer import BALANCE, MODES, Case
from peers import Bench, difference, peers
from step import TARGETS, pair, smollm2
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from rotmole.ops.compiled import _kernels

WIDTHS = (8, 576, 576)  # T, D, O
REPEATS = 20  # steps of a round: one takes less than a millisecond
EAGER, TOKEN = "operations, forward and backward", "operations, one token"
KERNELS = "operations and kernels, forward and backward"
TOKEN_KERNELS = "operations and kernels, one token"
COMPILED = "compiled kernels, forward and backward"
FIXED, FIXED_TOKEN = "fixed cost, forward and backward", "fixed cost, one token"
DECODED = "operations, one decoded token"
NOTHING = ("_unsafe_view", "empty", "new_empty")  # operations that launch nothing
Step = Callable[[], Any]


class Operations(TorchDispatchMode):
    """Counts ATen operations that make or fill a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        # promote_types and others return no tensor
        if isinstance(result, (torch.Tensor, tuple, list)):
            self.count += launches(function.overloadpacket.__name__)
        return result


@cache
def launches(name: str) -> bool:
    """Say whether an ATen operation starts a kernel: views and empty tensors do not."""
    packet = getattr(torch.ops.aten, name, None)
    forms = [] if packet is None else [getattr(packet, each) for each in packet.overloads()]
    return not name.startswith(NOTHING) and not any(form.is_view for form in forms)


def operations(step: Step) -> int:
    """Count the ATen operations of one step, the second one."""
    step()
    with Operations() as counter:
        step()
    return counter.count


def kernels(step: Step) -> int:
    """Count the kernels of one step of a compiled layer: those of the device if it is a GPU."""
    step()
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=activities) as record:
        step()
    events = record.events() or []
    launched = [
        event for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]  # fmt: skip
    return len(launched) or sum(_is_kernel(event) for event in events)


def _is_kernel(event: Any) -> bool:
    """Say whether a profiled event is a generated kernel, or an operation that none contains."""

    def starts(name: str) -> bool:
        # a package, of kernels: compiled, calls products by the name of aoti_torch_
        return (
            name.startswith("aoti_torch_")
            or "cpp_fused" in name
            or (name.startswith("aten::") and launches(name.removeprefix("aten::")))
        )

    parent = event.cpu_parent
    while parent is not None:
        if starts(parent.name):
            return False
        parent = parent.cpu_parent
    return starts(event.name)


def with_names(step: Step) -> int:
    """Count the kernels of a step that compiles, each with its name in the profile."""
    from torch._inductor import config  # only here: the others do without the compiler

    forget()
    with config.patch({"cpp.enable_kernel_profile": True}):
        found = kernels(step)
    forget()
    return found


def forget() -> None:
    """Let what is compiled be compiled anew, with the settings of then."""
    torch._dynamo.reset()
    _kernels.cache_clear()


def compiled(step: Callable[[nn.Module], Step], layer: nn.Module) -> int:
    """Compile a layer and count its kernels."""
    return with_names(step(torch.compile(layer, dynamic=False)))


def one_token(layer: nn.Module, x: torch.Tensor) -> Step:
    """Return a step of one token without gradients, the layer in evaluation."""

    def step() -> None:
        with torch.no_grad():
            layer(x)

    return step


def counted(
    case: str, mode: str, measure: str, against: str, ours: int, theirs: int,
    question: str = "launches",
) -> Row:  # fmt: skip
    """Return the row of two counts."""
    value = ours / theirs
    sides = {"ours": float(ours), "baseline": float(theirs)}
    return show(Row(question, case, mode, measure, against, value, value, value, **sides))


def fixed(row: tuple[str, ...], against: str, ours: Step, theirs: Step, rounds: int) -> Row:
    """Return the row of two processor times of one step."""

    def often(step: Step) -> Step:
        return lambda: [step() for _ in range(REPEATS)]

    both = {"ours": often(ours), "lora": often(theirs)}
    times = alternate(both, rounds, warm_up=1, clock=process_time)
    times = {name: [seconds / REPEATS for seconds in taken] for name, taken in times.items()}
    return show(Row("launches", *row, against, **ratio(times, "ours", "lora")))


def measure(case: Case, mode: str, rounds: int, **more: Any) -> list[Row]:
    """Count and time ours in one mode beside LoRA, eager."""
    ours = case.ours(mode, **more)
    lora = case.lora(ours)
    row, against = (str(case), named(mode, more)), lora_name(lora)
    both = case.step(ours), case.step(lora)
    rows = [
        counted(*row, EAGER, against, *map(operations, both)),
        fixed((*row, FIXED), against, *both, rounds),
    ]
    if more:  # a balance loss is no part of a pass without gradients
        return rows
    x = case.x.detach()[:1, :1]
    both = one_token(ours.eval(), x), one_token(lora.eval(), x)
    rows.append(counted(*row, TOKEN, against, *map(operations, both)))
    rows.append(fixed((*row, FIXED_TOKEN), against, *both, rounds))
    return rows


def named(mode: str, more: dict[str, Any]) -> str:
    return f"{mode}, balance loss on" if more else mode


def measure_compiled(case: Case, mode: str, lora_kernels: int, **more: Any) -> Row:
    """Count the kernels of ours in one mode beside LoRA's."""
    ours = case.ours(mode, **more)
    against = lora_name(case.lora(ours))
    count = compiled(case.step, ours)
    return counted(str(case), named(mode, more), COMPILED, against, count, lora_kernels)


def measure_kernels(case: Case, mode: str, rounds: int, **more: Any) -> list[Row]:
    """Count and time what ours with `kernels: compiled` starts beside what LoRA, eager, does."""
    ours = case.ours(mode, kernels="compiled", **more)
    lora = case.lora(ours)
    both = case.step(ours), case.step(lora)
    row, against = (str(case), f"{named(mode, more)}, kernels compiled"), lora_name(lora)
    rows = [
        counted(*row, KERNELS, against, with_names(both[0]), operations(both[1])),
        fixed((*row, FIXED), against, *both, rounds),
    ]
    if more:
        return rows
    x = case.x.detach()[:1, :1]
    both = one_token(ours.eval(), x), one_token(lora.eval(), x)
    rows.append(counted(*row, TOKEN_KERNELS, against, with_names(both[0]), operations(both[1])))
    rows.append(fixed((*row, FIXED_TOKEN), against, *both, rounds))
    return rows


def others(given: Any, case: Case) -> dict[str, tuple[Bench, nn.Module]]:
    """Make the other systems' layers, each with what makes steps of it; outputs agree with ours."""
    made = {}
    for name, peer in peers(given.originals).items():
        bench = Bench((case.tokens, case.inputs, case.outputs), case.shape)
        ours = bench.ours("none", peer.selection)
        layer = peer.make(ours.experts("default"), bench.base())
        if not difference(bench, peer, ours, layer) < 1e-4:
            raise SystemExit(f"{name}: outputs do not agree, so counts mean nothing")
        made[name] = bench, layer
    return made


def measure_other(case: Case, name: str, bench: Bench, layer: nn.Module, rounds: int) -> list[Row]:
    """Count and time another system's layer beside the LoRA of mode none."""
    lora = case.lora(case.ours("none"))
    row, against = (str(case), name), lora_name(lora)
    both = bench.step(layer), case.step(lora)
    x = bench.x.detach()[:1, :1]
    rows = [
        counted(*row, EAGER, against, *map(operations, both)),
        fixed((*row, FIXED), against, *both, rounds),
    ]
    both = one_token(layer.eval(), x), one_token(lora.eval(), x)
    rows.append(counted(*row, TOKEN, against, *map(operations, both)))
    rows.append(fixed((*row, FIXED_TOKEN), against, *both, rounds))
    layer.train()
    return rows


def decoding(quick: bool) -> list[Row]:
    """Count the operations of one decoded token of a whole model with adapters on q,k,v,o."""
    rows, base = [], smollm2(quick)
    for mode in MODES:
        ours, lora = pair(base, mode, SHAPES[0], TARGETS["q,k,v,o"])
        counts = []
        for model in (ours, lora):
            tokens = decoder(model.eval(), 1)
            counts.append(operations(lambda t=tokens: next(t)))
        E, R, K = SHAPES[0]
        case = f"q,k,v,o batch 1 E={E} R={R} K={K}"
        rows.append(counted(case, mode, DECODED, lora_name(lora), *counts))
        del ours, lora
    return rows


def main() -> int:
    """Count and time every mode, with and without the balance loss, and the other systems."""
    options = parser(__doc__)
    options.add_argument("--originals", type=Path, help="folder of the checkouts")
    given = options.parse_args()
    start(given)
    case = Case((8, 32, 48) if given.quick else WIDTHS, SHAPES[0], "float32")
    modes = [(mode, more) for mode in (MODES[:2] if given.quick else MODES)
             for more in ({}, {"router_aux_loss_coef": BALANCE})]  # fmt: skip
    rows = [row for mode, more in modes for row in measure(case, mode, given.rounds, **more)]
    layers = others(given, case)
    for name, (bench, layer) in layers.items():
        rows += measure_other(case, name, bench, layer, given.rounds)
    rows += decoding(given.quick)
    finish(rows, given)  # the compiler takes minutes: what is counted is kept
    lora = case.lora(case.ours("none"))
    lora_kernels = compiled(case.step, lora)
    for mode, more in modes:
        rows += measure_kernels(case, mode, given.rounds, **more)
    for mode, more in modes:
        rows.append(measure_compiled(case, mode, lora_kernels, **more))
        finish(rows, given)
    for name, (bench, layer) in layers.items():
        try:
            count = compiled(bench.step, layer)
        except Exception as error:  # another system's code, which need not compile
            print(f"{name}: does not compile: {type(error).__name__}")
            continue
        rows.append(counted(str(case), name, COMPILED, lora_name(lora), count, lora_kernels))
    return finish(rows, given)


if __name__ == "__main__":
    run(main)
