"""Each law is broken by a planted fault and named; nothing is named for sound adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LilyConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import rotmole
import tiny
from rotmole.evaluation.target import with_adapter
from rotmole.inspection.laws import LAWS, TOLERANCE, Report, check_laws

SETTINGS: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
METHODS = {
    "ours": rotmole.RotMoleConfig(r=4, num_experts=4, **SETTINGS),
    "lora": LoraConfig(r=4, lora_dropout=0.5, **SETTINGS),
    "lily": LilyConfig(r=4, **SETTINGS),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def base() -> Any:
    return tiny.llama(num_hidden_layers=1).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter of each method, whose weights do something."""
    found = {}
    for name, config in METHODS.items():
        torch.manual_seed(3)
        model = get_peft_model(base(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.3)
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name], save_embedding_layers=False)
    return found


def names(report: Report) -> set[str]:
    return {finding.law.name for finding in report.findings if not finding.kept}


Fault = Callable[[nn.Module, Tensor], Tensor]


def planted(fault: Fault, *, also_disabled: bool = False) -> Callable[[Any, Path], PeftModel]:
    """Put an adapter on a model, with a fault behind each of its layers."""

    def adapt(model: Any, folder: Path) -> PeftModel:
        adapted = with_adapter(model, folder)

        def hook(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            off = module.disable_adapters and not also_disabled
            return output if off else fault(module, output)

        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                module.register_forward_hook(hook)
        return adapted

    return adapt


def running_mean(_: nn.Module, y_BTO: Tensor) -> Tensor:
    count_T1 = torch.arange(1, y_BTO.shape[1] + 1)[:, None]
    return y_BTO + 0.1 * y_BTO.cumsum(1) / count_T1


def next_token(_: nn.Module, y_BTO: Tensor) -> Tensor:
    return y_BTO + 0.1 * torch.cat([y_BTO[:, 1:], y_BTO[:, -1:]], 1)


def counting(module: Any, y_BTO: Tensor) -> Tensor:
    """Keep something of training, as running statistics do."""
    module.seen = getattr(module, "seen", 0) + module.training
    return y_BTO * (1 + 0.1 * module.seen)


def remembering(module: Any, y_BTO: Tensor) -> Tensor:
    """Use the size of the batch before."""
    before, module.rows = getattr(module, "rows", 1), len(y_BTO)
    return y_BTO * (1 + 0.1 * before)


PLANTED: dict[str, tuple[Fault, set[str]]] = {
    "batch mean": (lambda _, y: y + 0.1 * y.mean(0), {"other rows"}),
    "running mean": (running_mean, {"padding left", "cache"}),
    "length": (lambda _, y: y * (1 + y.shape[1]), {"padding left", "padding right", "cache"}),
    "one token": (lambda _, y: y * (1.1 if y.shape[1] == 1 else 1), {"cache"}),
    "next token": (next_token, {"padding right", "cache", "later tokens"}),
    "training": (counting, {"training mode"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_breaks_its_laws_and_no_other(name: str, folders: dict[str, Path]) -> None:
    fault, broken = PLANTED[name]
    assert names(check_laws(base, folders["lora"], adapt=planted(fault))) == broken


def test_one_set_of_three_is_no_fault(folders: dict[str, Path]) -> None:
    """As where a router's scores tie and rounding decides: the median is judged."""
    batches: dict[int, int] = {}

    def once(module: nn.Module, y_BTO: Tensor) -> Tensor:
        count = batches[id(module)] = batches.get(id(module), 0) + (len(y_BTO) > 1)
        # three batches are scored before the laws; the fifth is the second set's
        return y_BTO + 0.1 * y_BTO.mean(0) if count == 5 and len(y_BTO) > 1 else y_BTO

    assert names(check_laws(base, folders["lora"], adapt=planted(once))) == set()
    assert set(batches.values()) != {0}


def test_a_fault_of_the_base_model_is_not_the_adapters(folders: dict[str, Path]) -> None:
    def load() -> Any:
        model = base()
        model.model.norm.register_forward_hook(lambda _, x, y: y + 0.1 * y.mean(0))
        return model

    report = check_laws(load, folders["lora"])
    assert names(report) == set()
    assert report.findings[0].base > 100 * TOLERANCE[torch.float32]


def test_what_a_call_leaves_for_the_next_is_named(folders: dict[str, Path]) -> None:
    report = check_laws(base, folders["lora"], adapt=planted(remembering))
    assert {"earlier calls", "training mode"} <= names(report)


def test_a_disabled_adapter_that_still_acts(folders: dict[str, Path]) -> None:
    adapt = planted(lambda _, y: y * (1 + 1e-6), also_disabled=True)
    assert names(check_laws(base, folders["lora"], adapt=adapt)) == {"disabled"}


def test_an_adapter_that_is_saved_otherwise_than_it_computes(folders: dict[str, Path]) -> None:
    def adapt(model: Any, folder: Path) -> PeftModel:
        adapted = with_adapter(model, folder)
        for module in adapted.modules():
            if isinstance(module, LoraLayer) and folder == folders["lora"]:
                module.scaling["default"] *= 1.5
        return adapted

    assert names(check_laws(base, folders["lora"], adapt=adapt)) == {"reload"}


def test_a_model_that_ends_in_an_error_or_in_nan(folders: dict[str, Path]) -> None:
    def fail(module: nn.Module, output: Tensor) -> Tensor:
        raise KeyError("scalings")

    report = check_laws(base, folders["lora"], adapt=planted(fail))
    assert names(report) == {law.name for law in LAWS} - {"disabled"}
    assert {f.error for f in report.findings if not f.kept} == {"KeyError: 'scalings'"}
    report = check_laws(base, folders["lora"], adapt=planted(lambda _, y: y * float("nan")))
    assert names(report) == {law.name for law in LAWS} - {"disabled"}
    assert report.seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ours", "lora"])
def test_a_sound_adapter_breaks_nothing(
    name: str, dtype: torch.dtype, folders: dict[str, Path]
) -> None:
    report = check_laws(lambda: base().to(dtype), folders[name])
    assert names(report) == set()
    assert report.seen
    rounded = [f for f in report.findings if not f.law.exact]
    assert all(f.tolerance >= TOLERANCE[dtype] for f in rounded)
    assert all(f.difference == 0 for f in report.findings if f.law.exact)


def test_pefts_lily_routes_by_the_whole_batch(folders: dict[str, Path]) -> None:
    broken = {"other rows", "padding left", "padding right", "cache", "later tokens"}
    assert names(check_laws(base, folders["lily"])) == broken


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT's, on each generation
def test_virtual_tokens_come_before_the_padding(folders: dict[str, Path]) -> None:
    assert names(check_laws(base, folders["prompt"])) == {"padding left"}


def test_an_untrained_adapter_shows_no_fault(tmp_path: Path) -> None:
    torch.manual_seed(3)
    get_peft_model(base(), METHODS["lily"]).save_pretrained(tmp_path, save_embedding_layers=False)
    report = check_laws(base, tmp_path)
    assert names(report) == set()
    assert not report.seen


def test_the_global_generator_is_left_alone(folders: dict[str, Path]) -> None:
    """The adapter has dropout, so a forward pass in training mode draws."""
    states: dict[str, Tensor] = {}
    check_laws(
        base, folders["lora"], say=lambda text: states.setdefault(text, torch.get_rng_state())
    )
    assert torch.equal(states["other rows"], states["reload"])
