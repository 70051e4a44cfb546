"""The balance loss acts, with the right gradient, wherever a model is trained."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model

import tiny
from rotmole import RotMoleConfig, balance_states
from rotmole.ops import load_balance_loss, router_z_loss, select
from rotmole.tuner.batch.losses import LossWeights

COEFFICIENT, Z_COEFFICIENT = 0.7, 0.3


def _adapted(**settings: object) -> PeftModel:
    config = RotMoleConfig(
        **(
            {
                "r": 4, "num_experts": 4, "top_k": 2, "target_modules": ["q_proj", "v_proj"],
                "router_aux_loss_coef": COEFFICIENT, "router_z_loss_coef": Z_COEFFICIENT,
                "init_weights": False,
            }
            | settings
        )
    )  # fmt: skip
    return get_peft_model(tiny.llama(), config).double()


def _routers(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if n.endswith("router_weight")}


def _gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in _routers(model).items()}


def _loss(model: PeftModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    labels = ids.masked_fill(mask == 0, -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def _batch(rows: int = 4, length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    ids = tiny.tokens(rows, length)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    mask[1, 6:] = 0
    return ids, mask


def _expected(model: PeftModel, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of task loss + losses written out by hand from captured layer inputs."""
    silent = copy.deepcopy(model)
    layers = [m for m in silent.modules() if hasattr(m, "rotmole_experts")]
    captured: list[tuple[torch.nn.Module, torch.Tensor]] = []
    for layer in layers:
        layer.experts("default").loss_weights = LossWeights()
        layer.register_forward_pre_hook(lambda m, args: captured.append((m, args[0])))
    total = _loss(silent, ids, mask)
    for layer, x in captured:
        logits = x @ layer.experts("default").router_weight.T
        rows = []
        for n in range(len(ids)):
            kept = logits[n][mask[n].bool()]
            routing = select(kept, top_k=2)
            rows.append(load_balance_loss(routing.probability_TE, routing.selected_TE) * len(kept))
        balance = sum(rows) / mask.sum()
        z = router_z_loss(logits.flatten(0, 1), mask.flatten())
        total = total + (COEFFICIENT * balance + Z_COEFFICIENT * z) / len(captured)
    total.backward()
    return _gradients(silent)


def _close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12)


def _plain(model: PeftModel) -> None:
    del model


def _checkpointed(reentrant: bool) -> Callable[[PeftModel], None]:
    def prepare(model: PeftModel) -> None:
        model.enable_input_require_grads()
        tiny.enable_checkpointing(model, reentrant)

    return prepare


@pytest.mark.parametrize("prepare", [_plain, _checkpointed(False), _checkpointed(True)])
def test_the_gradient_is_that_of_the_sum_padding_left_out(
    prepare: Callable[[PeftModel], None],
) -> None:
    model, (ids, mask) = _adapted(), _batch()
    expected = _expected(model, ids, mask)
    prepare(model)
    model.train()
    for _ in range(2):  # the second step is where a stale graph would crash
        model.zero_grad()
        _loss(model, ids, mask).backward()
        _close(_gradients(model), expected)
    (state,) = balance_states(model)
    assert state.count == 2 * 4  # once a layer and step, recomputation or not
    popped = state.pop()
    assert popped is not None
    assert 0.5 < popped["router_aux_loss"] < 2
    assert state.pop() is None


@pytest.mark.parametrize("settings", [{}, {"selection": "top_p"}])
def test_second_derivatives_are_refused(settings: dict) -> None:
    """Backward through the output again would add the losses' gradient again."""
    model = _adapted(target_modules=["q_proj"], **settings)
    layer = next(m for m in model.modules() if hasattr(m, "rotmole_experts"))
    router = layer.experts("default").router_weight
    total = layer(torch.randn(2, 5, layer.in_features, dtype=torch.float64)).square().sum()
    (first,) = torch.autograd.grad(total, router, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_the_task_loss_is_reported_without_the_balance_loss() -> None:
    ids, mask = _batch()
    on, off = _adapted(), _adapted(router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    assert torch.equal(_loss(on, ids, mask), _loss(off, ids, mask))
    for model in (on, off):
        _loss(model, ids, mask).backward()
    changed = [not torch.equal(a, b) for a, b in zip(
        _gradients(on).values(), _gradients(off).values(), strict=True)]  # fmt: skip
    assert all(changed)
    experts = [
        n for n, _ in on.named_parameters() if n.endswith("q_proj.rotmole_experts.default.expert_A")
    ]
    last = dict(on.named_parameters())[experts[-1]].grad
    same = dict(off.named_parameters())[experts[-1]].grad
    torch.testing.assert_close(last, same)  # nothing after the last layer's experts reads a router


def _accumulated(scope: str, sizes: list[int]) -> dict[str, torch.Tensor]:
    """Gradient of a full batch of equal lengths, in micro-batches, as a trainer forms it."""
    model = _adapted(router_aux_loss_scope=scope)
    ids = tiny.tokens(4, 7)
    (state,) = balance_states(model)
    state.loss_scale, state.managed = 1 / len(sizes), True
    for part in ids.split(sizes):
        (_loss(model, part, torch.ones_like(part)) / len(sizes)).backward()
    return _gradients(model)


def test_sequence_scope_does_not_depend_on_the_split() -> None:
    whole = _accumulated("sequence", [4])
    for sizes in ([2, 2], [1, 1, 1, 1]):
        _close(_accumulated("sequence", sizes), whole)


def test_micro_batch_scope_depends_on_the_split() -> None:
    whole, split = _accumulated("micro_batch", [4]), _accumulated("micro_batch", [1, 1, 1, 1])
    assert any((whole[n] - split[n]).abs().max() > 1e-4 for n in whole)


def test_unmanaged_accumulation_warns_once() -> None:
    model, (ids, mask) = _adapted(), _batch()
    _loss(model, ids, mask).backward()
    with pytest.warns(UserWarning, match="accumulated with a balance loss"):
        _loss(model, ids, mask).backward()
    _loss(model, ids, mask).backward()  # a second warning would be an error
    model.zero_grad()
    assert balance_states(model)[0].warned


def test_the_loss_does_not_depend_on_depth_or_number_of_targets() -> None:
    """Twice the layers share one coefficient: the weights of all layers sum to it."""
    for targets, layers in ((["q_proj"], 1), (["q_proj", "k_proj", "v_proj"], 3)):
        config = RotMoleConfig(r=4, target_modules=targets, router_aux_loss_coef=COEFFICIENT)
        model = get_peft_model(tiny.llama(num_hidden_layers=layers), config)
        weights = [
            m.experts("default").loss_weights.balance
            for m in model.modules()
            if hasattr(m, "rotmole_experts")
        ]
        assert len(weights) == layers * len(targets)
        assert sum(weights) == pytest.approx(COEFFICIENT)


def test_training_with_it_balances_the_experts() -> None:
    torch.manual_seed(0)
    ids, mask = tiny.tokens(8, 12), torch.ones(8, 12, dtype=torch.long)
    reached = {}
    for coefficient in (0.0, 1.0):
        model = _adapted(router_aux_loss_coef=1e-9 + coefficient, router_z_loss_coef=0.0)
        optimizer = torch.optim.AdamW(_routers(model).values(), lr=2e-2)
        for _ in range(30):
            optimizer.zero_grad()
            _loss(model, ids, mask).backward()
            optimizer.step()
            popped = balance_states(model)[0].pop()
        reached[coefficient] = popped["router_aux_loss"]
    assert reached[1.0] < reached[0.0]
    assert reached[1.0] < 1.05


def test_encoder_and_decoder_use_their_own_masks() -> None:
    config = RotMoleConfig(r=4, target_modules=["q"], router_aux_loss_coef=1.0)
    model = get_peft_model(tiny.t5(), config)
    ids = tiny.tokens(2, 6)
    encoder, decoder = torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)
    encoder[0, 3:] = 0
    decoder[1, 2:] = 0
    model(
        input_ids=ids, attention_mask=encoder, labels=ids, decoder_attention_mask=decoder
    ).loss.backward()
    assert [int(state.sums[3]) for state in balance_states(model)] == [
        layers * int(mask.sum())
        for layers, mask in ((2, encoder), (4, decoder))  # the decoder has cross-attention too
    ]


def test_unloading_removes_the_hook() -> None:
    base = tiny.llama()
    model = get_peft_model(
        base, RotMoleConfig(r=4, target_modules=["q_proj"], router_aux_loss_coef=1.0)
    )
    assert base._forward_pre_hooks
    model.unload()
    assert not base._forward_pre_hooks


def test_a_frozen_adapter_feels_no_balance_loss() -> None:
    model, (ids, mask) = _adapted(), _batch()
    model.requires_grad_(False)
    gradients = []
    for coefficient in (COEFFICIENT, 0.0):
        if not coefficient:
            for layer in model.modules():
                if hasattr(layer, "rotmole_experts"):
                    layer.experts("default").loss_weights = LossWeights()
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, attention_mask=mask, labels=ids).loss.backward()
        gradients.append(embedded.grad)
    assert torch.equal(*gradients)
    assert balance_states(model)[0].pop() is None


@pytest.mark.parametrize("router", ["linear", "mlp"])  # the gradient by hand, and by autograd
def test_the_record_does_not_grow_with_the_passes_nobody_reads(router: str) -> None:
    """A plain loop may never call `pop`; a million passes must not fill the memory."""
    model, (ids, mask) = _adapted(router=router), _batch()
    (state,) = balance_states(model)

    def held() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    def passes(count: int) -> None:
        for _ in range(count):
            model.zero_grad()
            _loss(model, ids, mask).backward()

    passes(2)
    first = held()
    passes(6)
    assert held() <= first
    assert state.count == 8 * 4
    sums = [each for each in state.sums if isinstance(each, torch.Tensor)]
    assert sums
    assert all(each.grad_fn is None for each in sums)


def test_the_record_of_one_pass_through_one_layer_holds_no_graph() -> None:
    model, (ids, mask) = (
        _adapted(router="mlp", layers_to_transform=[0], target_modules=["q_proj"]),
        _batch(),
    )
    (state,) = balance_states(model)
    _loss(model, ids, mask).backward()
    assert state.count == 1
    sums = [each for each in state.sums if isinstance(each, torch.Tensor)]
    assert sums
    assert all(each.grad_fn is None for each in sums)
