"""The figures: known angles, planes and affinities; chance; memory that does not grow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from rotmole import RotMoleConfig, record_routing
from rotmole.recording import LayerStatistics, RoutingLog, TaskStatistics
from rotmole.recording.statistics import BINS, bin_edges
from rotmole.recording.sums import add_planes


class Net(nn.Module):
    """One linear layer, which an adapter turns into a mixture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


def adapted(width: int = 4, **settings: Any) -> Any:
    torch.manual_seed(0)
    chosen = {"num_experts": 4, "top_k": 2, "r": 4, "target_modules": ["linear"]} | settings
    return get_peft_model(Net(width), RotMoleConfig(**chosen, init_weights=False)).eval()


def weights(model: Any) -> Any:
    return model.get_base_model().linear.experts("default")


def only_layer(log: RoutingLog) -> LayerStatistics:
    (layer,) = log.layers.values()
    return layer


@torch.no_grad()
def test_an_expert_turned_by_a_right_angle_for_one_task_alone() -> None:
    """Feature 0 is 1 in French rows; expert 2 turns by pi/2 times it, the others never turn."""
    model = adapted(rotation="givens", rotation_planes=1, selection="dense")
    weights(model).rotation_angle.zero_()
    weights(model).rotation_angle[2, 0, 0] = math.pi / 2
    x = torch.randn(4, 10, 4)
    x[..., 0] = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None]
    with record_routing(model, angles=(0.5, 1.6)) as log, log.of(["de", "fr", "de", "fr"]):
        model(x)
    tasks = only_layer(log).tasks
    german, french = tasks["de"].rotation, tasks["fr"].rotation
    assert german.mean_absolute_E.tolist() == [0.0] * 4
    assert german.resultant_E.tolist() == [1.0] * 4
    assert german.direction_E.tolist() == [0.0] * 4
    assert french.mean_absolute_E.tolist() == pytest.approx([0, 0, math.pi / 2, 0])
    assert french.direction_E.tolist() == pytest.approx([0, 0, math.pi / 2, 0])
    assert french.beyond_share_EA.tolist() == [[0, 0], [0, 0], [1, 0], [0, 0]]
    assert french.count_E.tolist() == [20] * 4
    bins = french.histogram_EH[2].nonzero().flatten().tolist()
    edges = bin_edges()
    assert len(bins) == 1
    assert edges[bins[0]] - 1e-6 <= math.pi / 2 <= edges[bins[0] + 1] + 1e-6
    assert len(edges) == BINS + 1
    total = only_layer(log).total().rotation
    assert total.resultant_E[2] == pytest.approx(math.sqrt(0.5))
    assert total.direction_E[2] == pytest.approx(math.pi / 4)


@torch.no_grad()
def test_experts_that_follow_the_language_and_one_that_takes_all() -> None:
    """The router reads feature 0: experts 0 and 1 for German, 2 and 3 for French."""
    model = adapted(rotation="none")
    weights(model).router_weight.zero_()
    weights(model).router_weight[:, 0] = torch.tensor([-9.0, -8.0, 9.0, 8.0])
    x = torch.randn(4, 10, 4)
    x[..., 0] = torch.tensor([-1.0, 1.0, -1.0, 1.0])[:, None]
    with record_routing(model) as log, log.of(["de", "fr", "de", "fr"]):
        model(x)
    layer = only_layer(log)
    assert layer.tasks["de"].selection_share_E.tolist() == [0.5, 0.5, 0, 0]
    assert layer.tasks["fr"].selection_share_E.tolist() == [0, 0, 0.5, 0.5]
    assert layer.tasks["fr"].top_share_E.tolist() == [0, 0, 1, 0]
    assert layer.tasks["fr"].token_share_E.tolist() == [0, 0, 1, 1]
    assert layer.tasks["fr"].pair_share_EE[2].tolist() == [0, 0, 1, 1]
    assert layer.tasks["fr"].mean_weight_E[2] == pytest.approx(1 / (1 + math.exp(-1)))
    assert layer.tasks["fr"].mean_weight_E[0].isnan()
    assert layer.tasks["fr"].weight_share_E[2] == pytest.approx(1 / (1 + math.exp(-1)))
    assert layer.tasks["fr"].usage_entropy == pytest.approx(math.log(2))
    assert layer.tasks["fr"].usage_entropy_share == pytest.approx(0.5)
    assert layer.total().usage_entropy_share == pytest.approx(1)
    information = layer.mutual_information()
    assert information.value == pytest.approx(math.log(2))
    assert information.ceiling == pytest.approx(math.log(2))
    assert information.limit < 0.05
    weights(model).router_weight.zero_()  # equal scores choose the lowest numbers
    with record_routing(model) as log:
        model(x)
    total = only_layer(log).total()
    assert total.selection_share_E.tolist() == [0.5, 0.5, 0, 0]
    assert total.mean_entropy == pytest.approx(math.log(4))
    assert total.mean_entropy_share == pytest.approx(1)
    assert only_layer(log).mutual_information() is None


def of_rows(tasks: int, rows: int, counts: Any) -> LayerStatistics:
    """A layer whose rows have the given choices, counts(number of the row) -> [E]."""
    layer = LayerStatistics(4, 1, "top_k", "none", 4, has_router=True)
    for task in range(tasks):
        statistics = TaskStatistics.empty(4)
        for row in range(rows):
            choices_E = torch.tensor(counts(task * rows + row))
            statistics.rows += 1
            statistics.tokens += int(choices_E.sum())
            statistics.choices_E += choices_E
            statistics.squares_E += choices_E.double() ** 2 / choices_E.sum()
        layer.tasks[str(task)] = statistics
    return layer


@pytest.mark.parametrize("alike", [False, True])
def test_chance_is_what_rows_without_affinity_give(alike: bool) -> None:
    """Also if the tokens of a row resemble each other, as those of one text do."""
    random = np.random.default_rng(0)

    def counts(row: int) -> Any:
        p = random.dirichlet([2, 4, 4, 6]) if alike else [1 / 8, 2 / 8, 2 / 8, 3 / 8]
        return random.multinomial(random.integers(20, 60), p)

    found = [of_rows(3, 20, counts).mutual_information() for _ in range(150)]
    values = np.array([information.value for information in found])
    chances = np.array([information.chance for information in found])
    assert values.mean() / chances.mean() == pytest.approx(1, abs=0.15)
    beyond = np.mean([information.value > information.limit for information in found])
    assert 0.01 <= beyond <= 0.1
    tokens = np.mean([3 * 20 * 40])
    naive = 3 * 2 / (2 * tokens)
    assert (values.mean() > 2 * naive) == alike


def test_planes() -> None:
    """Tokens of one plane drift by 0, planes all around by nearly 1 - 2/R; no turn is no plane."""
    generator = torch.Generator().manual_seed(0)
    R, T = 6, 4000
    flat = torch.zeros(R, T)
    flat[:2] = torch.randn(2, T, generator=generator)
    right = torch.stack([-flat[1], flat[0], *flat[2:]])
    z, q = torch.randn(2, R, T, generator=generator)
    q = q - (q * z).sum(0) / z.square().sum(0) * z
    turned = torch.cos(torch.tensor(0.3)) * z + 0.3 * q
    layer = LayerStatistics(4, 4, "dense", "tangent", R, has_router=True)
    layer.tasks["all"] = TaskStatistics.empty(4)
    layer.tasks["all"].tokens = T
    counted_TE = torch.ones(T, 4, dtype=torch.bool)
    counted_TE[100:, 3] = False
    first, second = torch.stack([flat, z, z, flat]), torch.stack([right, turned, 2 * z, right])
    add_planes(layer, first, second, counted_TE)
    drift_E = layer.plane_drift_E
    assert drift_E[0] == pytest.approx(0, abs=1e-5)
    assert 0.95 * (1 - 2 / R) < drift_E[1] <= 1 - 2 / R
    assert drift_E[2].isnan()
    trace_E = layer.planes_ERR.diagonal(dim1=1, dim2=2).sum(-1)
    assert trace_E[0] == pytest.approx(2 * T, rel=1e-5)  # a right angle counts 1, in 2 directions
    assert trace_E[3] == pytest.approx(2 * 100, rel=1e-5)


def test_padding_has_no_plane() -> None:
    model = get_peft_model(
        tiny.llama(),
        RotMoleConfig(r=4, rotation="tangent", target_modules=["q_proj"], init_weights=False),
    ).eval()
    ids, mask = tiny.tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, 3:] = 0
    other = torch.where(mask.bool(), ids, (ids + 7) % tiny.VOCABULARY)
    planes = []
    for tokens in (ids, other):
        with record_routing(model) as log, torch.no_grad(), log.of(["a", "b"]):
            model(input_ids=tokens, attention_mask=mask)
        planes.append([layer.planes_ERR for layer in log.layers.values()])
    for mine, theirs in zip(*planes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_million_tokens_take_the_memory_of_a_few() -> None:
    import gc

    model = adapted(r=2, rotation="tangent")

    def held() -> int:
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    x = torch.randn(8, 2500, 4)
    with record_routing(model) as log:
        with log.of("a"):
            model(x)
        few = held()
        for _ in range(49):
            with log.of("a"):
                model(x)
        assert held() == few
        layer = only_layer(log)
        assert layer.total().tokens == 1_000_000
        assert int(layer.total().rotation.count_E.sum()) == 2_000_000


class Count(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_it_is_free_when_off() -> None:
    """The same operations and hooks before a recording and after it, and more inside."""
    config = RotMoleConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights=False)
    model, ids = get_peft_model(tiny.llama(), config).eval(), tiny.tokens(2, 6)

    def operations() -> int:
        with Count() as count:
            model(input_ids=ids)
        return count.operations

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before, hooked = operations(), hooks()
    with record_routing(model):
        assert operations() > before
        assert hooks() == hooked + 4
    with pytest.raises(ZeroDivisionError), record_routing(model):
        _ = 1 / 0
    assert operations() == before
    assert hooks() == hooked
