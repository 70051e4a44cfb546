"""A Batch belongs to one call: calls that are interrupted, run again, or made of a part alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_batch import (
    FULL,
    LENGTHS,
    OTHER,
    ROUTERS,
    adapted,
    assert_same,
    balance,
    bert,
    gradients,
    in_four_threads,
    of_routers,
    opt,
    padded,
    qwen2_moe,
)

import tiny
from rotmole import ModelError, balance_states
from rotmole.training.callbacks.usage import UsageCallback
from rotmole.tuner.layer import RotMoleLayer

OFF = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
CHOICE = {"selection": "expert_choice"} | OFF
CHECKPOINTING = [None, False, True]


def checkpointed(model: PeftModel, reentrant: bool | None) -> PeftModel:
    """Checkpoint the model's blocks; every loss counts in full, without a warning."""
    if reentrant is not None:
        tiny.enable_checkpointing(model, reentrant)
        model.enable_input_require_grads()
    for state in balance_states(model):
        state.managed = True
    return model


def body(model: PeftModel) -> torch.nn.Module:
    return model.base_model.model.model


def nothing_of(output: Any) -> torch.Tensor:
    """Return 0, whose backward pass reaches the routers through the balance losses alone."""
    return (output.logits if "logits" in output else output[0]).mul(0).sum()


def interrupt(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    """Call the model and press Ctrl-C, which is no Exception, while its last layer runs."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body(model).layers[1].mlp, "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            model(**batch)


# ---- a call that does not end


@pytest.mark.parametrize("reentrant", CHECKPOINTING)
def test_an_interrupted_call_leaves_nothing_to_the_next(reentrant: bool | None) -> None:
    model = checkpointed(adapted(tiny.llama(), ["q_proj", "down_proj"]), reentrant)
    wanted = gradients(model, lambda: balance(model, padded()))
    full = {name: value.clone() for name, value in FULL.items()}
    watched = [weakref.ref(value) for value in full.values()]
    interrupt(model, full)
    assert_same(gradients(model, lambda: balance(model, padded())), wanted)
    del full
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


def test_an_interrupted_call_does_not_lend_its_ids_to_a_part() -> None:
    model = adapted(tiny.llama(), ["q_proj"], **ROUTERS["hash"])
    interrupt(model, {"input_ids": tiny.tokens(3, 7)})
    with pytest.raises(ModelError, match="without input_ids"):
        body(model)(inputs_embeds=torch.randn(3, 7, 32, dtype=torch.float64))


# ---- a part of the model by itself


def test_a_part_called_by_itself_sees_its_own_mask_and_ids() -> None:
    model = adapted(tiny.llama(), ["q_proj", "down_proj"])
    balance(model, padded())
    for state in balance_states(model):
        state.pop()
    embedded = torch.randn(3, 7, 32, dtype=torch.float64)
    body(model)(inputs_embeds=embedded).last_hidden_state.mul(0).sum().backward()
    assert [float(state.sums[3]) for state in balance_states(model)] == [4 * 21]
    model = adapted(tiny.llama(), ["q_proj", "down_proj"], **ROUTERS["hash"]).eval()
    wanted = body(model)(**OTHER).last_hidden_state
    model(input_ids=tiny.tokens(2, 4))
    assert torch.equal(body(model)(**OTHER).last_hidden_state, wanted)


# ---- a second run in the backward pass


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_hold_a_list_of_parts_may_be_checkpointed(reentrant: bool) -> None:
    """A block of T5 calls the members of a ModuleList, never a child of its own."""
    batch = padded() | {"labels": tiny.tokens(3, 6)}
    plain, model = (adapted(tiny.t5(), ["q", "v", "wi"]) for _ in range(2))
    checkpointed(model, reentrant)
    wanted = gradients(plain, lambda: balance(plain, batch))
    assert_same(gradients(model, lambda: balance(model, batch)), wanted)


@pytest.mark.parametrize("reentrant", CHECKPOINTING)
def test_two_passes_of_the_same_embeddings_with_other_masks(reentrant: bool | None) -> None:
    """The first block gets one tensor both times: by itself it does not tell the passes apart."""
    model = checkpointed(adapted(tiny.llama(), ["q_proj", "down_proj"]), reentrant)
    embedded = torch.randn(3, 7, 32, dtype=torch.float64, requires_grad=True)
    masks = [padded()["attention_mask"], FULL["attention_mask"]]

    def loss(mask: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=embedded, attention_mask=mask).logits.square().mean()

    apart = [gradients(model, lambda mask=mask: loss(mask).backward()) for mask in masks]
    wanted = {name: apart[0][name] + apart[1][name] for name in apart[0]}

    def together() -> None:
        (loss(masks[0]) + loss(masks[1])).backward()

    _same_or_refused(model, together, wanted)


def test_many_passes_wait_for_one_backward_pass() -> None:
    model = checkpointed(adapted(tiny.llama(num_hidden_layers=1), ["q_proj"]), True)
    other, count = FULL, 70

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nothing_of(model(**batch))

    first = gradients(model, lambda: loss(padded()).backward())
    more = gradients(model, lambda: loss(other).backward())
    wanted = {name: first[name] + (count - 1) * more[name] for name in first}

    def together() -> None:
        torch.stack([loss(padded())] + [loss(other) for _ in range(count - 1)]).sum().backward()

    _same_or_refused(model, together, wanted)


def _same_or_refused(
    model: PeftModel, run: Callable[[], None], wanted: dict[str, torch.Tensor]
) -> None:
    try:
        together = gradients(model, run)
    except ModelError:
        return
    assert_same(of_routers(together), of_routers(wanted))


def test_a_pass_whose_output_is_gone_does_not_take_the_batch_of_another() -> None:
    """A loss of inner states alone: of that pass nothing keeps the batch, so it is refused."""
    model = checkpointed(adapted(tiny.llama(), ["q_proj", "down_proj"]), True)
    states: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handle = body(model).layers[0].register_forward_hook(keep)
    model(**padded())
    handle.remove()
    loss = states.pop().mul(0).sum() + nothing_of(model(**FULL))
    with pytest.raises(ModelError, match="computed again in a backward pass"):
        loss.backward()


@pytest.mark.parametrize("reentrant", CHECKPOINTING)
def test_no_batch_outlives_the_backward_pass(reentrant: bool | None) -> None:
    model = checkpointed(adapted(tiny.llama(), ["q_proj", "v_proj"]), reentrant)
    batch = {name: value.clone() for name, value in padded().items()}
    watched = [weakref.ref(value) for value in batch.values()]
    model(**batch).logits.sum().backward()
    del batch
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


@pytest.mark.parametrize("reentrant", CHECKPOINTING)
@pytest.mark.parametrize("settings", [CHOICE, ROUTERS["hash"]])
@pytest.mark.parametrize("other", [OTHER, FULL])
def test_an_encoder_may_run_twice_before_its_backward_pass(
    settings: dict[str, Any], other: dict[str, torch.Tensor], reentrant: bool | None
) -> None:
    model = checkpointed(adapted(bert(), ["query", "value"], **settings), reentrant)

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch).last_hidden_state.square().mean()

    apart = [gradients(model, lambda b=batch: loss(b).backward()) for batch in (padded(), other)]
    wanted = {name: apart[0][name] + apart[1][name] for name in apart[0]}
    assert_same(gradients(model, lambda: (loss(padded()) + loss(other)).backward()), wanted)


@pytest.mark.parametrize("reentrant", CHECKPOINTING)
def test_loads_of_two_passes_are_added_up(reentrant: bool | None) -> None:
    targets = ["q_proj", "down_proj"]
    model = checkpointed(adapted(tiny.llama(), targets, router_bias_rate=0.1, **OFF), reentrant)
    (model(**padded()).logits.sum() + model(**OTHER).logits.sum()).backward()
    layers = [m for m in model.modules() if isinstance(m, RotMoleLayer)]
    loads = [layer.experts("default").loads.loads_E.sum() for layer in layers]
    assert loads == [2 * (sum(LENGTHS) + 5)] * 4


# ---- threads, memory, usage


def test_threads_do_not_share_the_sequences_of_expert_choice() -> None:
    model = adapted(bert(), ["query", "value"], **CHOICE).eval()
    inputs = [padded(), FULL, OTHER, {"input_ids": tiny.tokens(2, 9)}]
    wanted = [model(**batch).last_hidden_state for batch in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(15):
            if not torch.equal(model(**inputs[number]).last_hidden_state, wanted[number]):
                wrong.append(number)

    in_four_threads(work)
    assert not wrong


def test_a_deleted_adapter_is_freed_while_a_chat_keeps_its_cache() -> None:
    model = adapted(tiny.llama(), ["q_proj", "v_proj"], **OFF)
    model.add_adapter("b", model.peft_config["default"])
    model.base_model.set_adapter(["default", "b"])
    model.eval()
    ids = tiny.tokens(1, 4)
    told = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **told)
    watched = [weakref.ref(p) for n, p in model.named_parameters() if ".b." in n]
    model.delete_adapter("b")
    gc.collect()
    assert answer.past_key_values is not None
    assert watched
    assert not [ref for ref in watched if ref() is not None]


@pytest.mark.parametrize(
    ("make", "targets"), [(qwen2_moe, ["gate_proj", "down_proj"]), (opt, ["fc1", "fc2"])]
)
def test_usage_counts_no_padding_of_flattened_layers(
    make: Callable[[], torch.nn.Module], targets: list[str]
) -> None:
    model = adapted(make(), targets, **OFF)
    usage = UsageCallback()
    usage.on_train_begin(None, None, None, model=model)
    model(**padded())
    usage.on_train_end(None, None, None)
    choices = {int(layer.total().choices_E.sum()) for layer in usage.log.layers.values()}
    assert choices == {2 * sum(LENGTHS)}


def test_usage_does_not_guess_the_side_by_the_number_of_tokens() -> None:
    """Both sides have 12 tokens: 2 rows of 6."""
    model = adapted(tiny.t5(), ["SelfAttention.q"], **OFF)
    usage = UsageCallback()
    usage.on_train_begin(None, None, None, model=model)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    labels = tiny.tokens(2, 6).clone()
    labels[0, 5:] = -100
    model(input_ids=tiny.tokens(2, 6), attention_mask=mask, labels=labels)
    usage.on_train_end(None, None, None)
    assert usage.log.layers
    for path, layer in usage.log.layers.items():
        choices = int(layer.total().choices_E.sum())
        assert choices == 2 * (8 if path.startswith("encoder.") else 11), path
