"""Every timing script says what it does; rounds become ratios, memory and rows as documented."""

from __future__ import annotations

import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
MODULES = {"common", "cost", "originals", "tables"}
NAMES = sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem not in MODULES)


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_the_script_does(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = SCRIPTS / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    first = path.read_text(encoding="utf-8").split("\n")[0].strip('"')
    assert first.split()[0] in said
    assert "--" in said


def test_make_bench_runs_every_question() -> None:
    makefile = (SCRIPTS.parent / "Makefile").read_text(encoding="utf-8")
    questions = re.findall(r"^(?:FULL_)?QUESTIONS := (.*)$", makefile, re.MULTILINE)
    tools = {"check", "gpu", "moved", "targets", "plot", "eval_parity", "serve_load"}
    assert sorted(" ".join(questions).split()) == sorted(set(NAMES) - tools)


def test_every_step_runs_once_a_round_forwards_then_backwards() -> None:
    import common

    order: list[str] = []
    steps = {name: (lambda n=name: order.append(n)) for name in "abc"}
    times = common.alternate(steps, rounds=2, warm_up=1)
    assert order == [*"abc", *"abc", *"cba"]
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_ratio_is_taken_inside_each_round() -> None:
    import common

    times = {"ours": [2.0, 30.0, 4.0], "lora": [1.0, 10.0, 2.0], "base": [0.5, 5.0, 2.0]}
    found = common.ratio(times, "ours", "lora")
    assert found["value"] == 2.0
    assert found["high_90"] == pytest.approx(2.8)
    less = common.ratio(times, "ours", "lora", less="base")
    assert less["rounds"] == 2  # in the last round LoRA's own share is lost in noise
    assert less["value"] == pytest.approx((3.0 + 5.0) / 2)
    nothing = common.ratio({"ours": [1.0], "lora": [1.0], "base": [1.0]}, "ours", "lora", "base")
    assert math.isnan(nothing["value"])
    assert nothing["rounds"] == 0


def test_a_quick_run_is_never_taken_for_the_real_thing(tmp_path: Path) -> None:
    import common

    given = common.parser("").parse_args(["--quick", "--csv", str(tmp_path / "step.csv")])
    given.began = 0.0
    row = common.Row("step", "case", "none", "training step", "", 1.0, 1.0, 1.0)
    assert common.finish([row], given) == 0
    assert [key[0] for key in common.read(tmp_path)] == ["quick step"]


def test_saved_memory_counts_each_storage_once_and_no_parameter() -> None:
    import common

    layer = nn.Linear(256, 512, bias=False)
    x = torch.randn(1024, 256, requires_grad=True)

    def step() -> torch.Tensor:
        y = layer(x)
        return y.exp() + y.sin() + y.cos()  # keep the result of exp, and y twice: 2 MiB each

    assert common.saved_mib(step, exclude=(layer, x)) == 4.0
    assert common.saved_mib(step, exclude=(layer,)) == 5.0


def test_lora_has_as_many_parameters_as_the_mixture() -> None:
    import common
    from peft import get_peft_model

    shape = (4, 6, 2)
    ours = get_peft_model(
        nn.Sequential(nn.Linear(64, 96)), common.adapter_config("plane", shape, ["0"])
    )
    lora = common.lora_like(ours, ["0"], nn.Sequential(nn.Linear(64, 96)))
    counts = [model.get_nb_trainable_parameters()[0] for model in (ours, lora)]
    assert abs(counts[0] - counts[1]) <= (64 + 96) / 2
    assert common.lora_name(lora) == f"PEFT LoRA r={counts[1] // (64 + 96)}"


@pytest.mark.parametrize("tokens", [8, 80])  # few, and many
@pytest.mark.parametrize("mode", ["none", "tangent", "plane", "givens", "bias", "centroid"])
def test_costs_on_paper_are_those_of_the_layer(mode: str, tokens: int) -> None:
    import common
    import cost
    from peft import get_peft_model
    from torch.utils.flop_counter import FlopCounterMode

    T, D, O, E, R, K = tokens, 24, 40, 4, 6, 2  # noqa: E741 - the legend's letter
    config = common.adapter_config(mode, (E, R, K), ["0"])
    layer = get_peft_model(nn.Sequential(nn.Linear(D, O)), config).base_model.model[0]
    paper = cost.Layer(T, D, O, E, K, R, mode)
    own = layer.experts("default")
    centers = E * R if mode == "centroid" else 0
    assert paper.parameters == sum(p.numel() for p in own.parameters()) - centers
    x = torch.randn(T, D, requires_grad=True)
    base = torch.zeros(T, O)
    kept = common.saved_mib(lambda: layer.add(base, x, "default"), exclude=(layer, x)) * 2**20
    assert kept == paper.saved_bytes
    with FlopCounterMode(display=False) as forward:
        y = layer.add(base, x, "default")
    assert forward.get_total_flops() == paper.forward_flops
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() + backward.get_total_flops() == paper.step_flops
