from __future__ import annotations

import pytest
import torch

import tiny_folders
from rotmole import RotMoleConfig
from rotmole.config.schema import ModelSection
from rotmole.models.duration import Speed, estimate_update, measured_speed, typical_widths
from rotmole.models.memory import traced_update
from rotmole.models.preview import preview

ONE = Speed(products=1.0, bytes=float("inf"), calls=float("inf"))  # a second for each operation


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    folder = tiny_folders.write_model(tmp_path_factory.mktemp("duration") / "model")
    return ModelSection(name=str(folder), dtype="float32", device="cpu")


def adapted(section, **settings):
    settings = {
        "r": 1,
        "num_experts": 1,
        "rotation": "none",
        "target_modules": ["q_proj"],
    } | settings
    return preview(section, RotMoleConfig(task_type="CAUSAL_LM", **settings), torch.float32)


def seconds(model, batch=2, length=8, learnt=0, speed=ONE, checkpointing=False):
    return estimate_update(
        model, speed, batch=batch, length=length, learnt=learnt, checkpointing=checkpointing
    )


def test_the_products_are_those_of_the_layers_and_of_attention(section):
    layer = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64  # q, k, v, o, and the feed-forward block
    forward = 2 * 2 * layer  # layers, operations a weight
    attention = 2 * 2 * 2 * 8 * 32  # layers, q k and p v, operations, keys, width
    both = 16 * (2 * forward + 3.5 * attention)  # tokens; attention's backward is 2.5 forwards
    model = adapted(section)
    assert 0.8 * both < seconds(model) < 1.05 * both  # nothing is behind the first k and v
    vocabulary = model.get_input_embeddings().weight.shape[0]
    head = seconds(adapted(section), learnt=3) - seconds(adapted(section))
    assert head == 4 * 3 * 32 * vocabulary


def test_more_tokens_experts_and_recomputation_take_longer(section):
    plain = seconds(adapted(section))
    assert seconds(adapted(section), batch=4) == pytest.approx(2 * plain, rel=0.01)
    assert seconds(adapted(section), length=16) > 2 * plain
    assert seconds(adapted(section, num_experts=8, r=8)) > 1.05 * plain
    assert 1.2 * plain < seconds(adapted(section), checkpointing=True) < 1.6 * plain
    calls = Speed(float("inf"), float("inf"), 1.0)
    traced = traced_update(adapted(section), batch=2, length=8, checkpointing=False)
    assert seconds(adapted(section), speed=calls) == 6 * traced.calls


def test_the_speed_of_this_machine_is_a_speed(section):
    widths = typical_widths(adapted(section))
    assert widths == (32, 64)
    speed = measured_speed(torch.device("cpu"), torch.float32, rows=64, widths=widths)
    assert all(value > 1e3 for value in (speed.products, speed.bytes, speed.calls))
