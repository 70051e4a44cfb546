"""Rows that share a sequence learn what they learn in a padded batch, and count as themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

import tiny
import tiny_folders
from rotmole import RotMoleConfig, balance_states, record_routing
from rotmole.config.load import load_run
from rotmole.data import Collator, PackedCollator, model_inputs
from rotmole.errors import ConfigError, ModelError
from rotmole.ops.routing.selection import SELECTIONS
from rotmole.training.build import Built, build
from rotmole.training.changes import facts_of
from rotmole.training.finite import first_nonfinite
from rotmole.training.run import train
from training_cases import run_file, settings

PACKS = [[0, 2, 5], [1], [4, 3]]
LOSSES = {
    "router_aux_loss_coef": 0.7, "router_z_loss_coef": 0.3, "router_task_loss_coef": 0.5,
    "router_task_groups": 2,
}  # fmt: skip


def made(model_folder: Any, data_folder: Any, folder: Any, **sections: Any) -> Built:
    """A run in float64, away from the adapter's start; every third row is learnt whole."""
    raw = settings(model_folder, data_folder, folder)
    raw["data"]["tasks"]["sums"]["loss_on"] = "all"
    raw["adapter"]["lora_dropout"] = 0.0
    for section, values in sections.items():
        raw[section] |= values
    built = build(load_run(None, text=yaml.safe_dump(raw)))
    built.model.double().train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=generator)
    return built


@pytest.fixture(scope="module")
def built(model_folder, data_folder, tmp_path_factory) -> Built:
    return made(model_folder, data_folder, tmp_path_factory.mktemp("run"), adapter=LOSSES)


def rows_of(built: Built) -> list[dict[str, Any]]:
    """Six rows of both tasks and of several lengths."""
    rows = [dict(built.trainer.train_dataset[number]) for number in range(12)]
    for number, row in enumerate(rows):  # the tiny tasks have rows of nearly one length
        row["input_ids"] = row["input_ids"] + rows[0]["input_ids"] * (number % 3)
        row["labels"] = row["labels"] + rows[0]["input_ids"] * (number % 3)
    return rows[:6]


def batches(built: Built) -> dict[str, dict[str, Any]]:
    rows, words = rows_of(built), built.base.tokenizer
    packs = [[rows[number] for number in pack] for pack in PACKS]
    return {
        "padded": Collator(words)([row for pack in packs for row in pack]),
        "packs": PackedCollator(words)(packs),
        "packs to a multiple": PackedCollator(words, 8)(packs),
        "flat": PackedCollator(words, flat=True)(packs),
    }


def learnt(built: Built, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The loss, its gradients with those of the balance losses, and what these reported."""
    trainer = built.trainer
    built.model.zero_grad(set_to_none=True)
    trainer.update_tokens = batch["attention_mask"].sum() * 2
    trainer.weigh_balance(batch)
    count = (batch["labels"][:, 1:] != -100).sum()
    loss = trainer.compute_loss(built.model, dict(batch), num_items_in_batch=count)
    loss.backward()
    (state,) = balance_states(built.model)
    terms = state.pop() or {}
    named = built.model.named_parameters()
    gradients = {name: p.grad for name, p in named if p.grad is not None}
    return {"loss": loss.detach()} | {n: torch.tensor(v) for n, v in terms.items()} | gradients


def compare(built: Built, rtol: float = 1e-10) -> None:
    made_of = batches(built)
    wanted = learnt(built, made_of.pop("padded"))
    assert any(name.endswith("router_weight") for name in wanted)
    for name, batch in made_of.items():
        ours = learnt(built, batch)
        assert ours.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(
                ours[key], value, rtol=rtol, atol=rtol / 100, msg=f"{name}: {key}"
            )


@pytest.mark.parametrize("selection", [name for name in SELECTIONS if name != "expert_choice"])
def test_packs_learn_what_padded_rows_learn(selection, model_folder, data_folder, tmp_path):
    adapter = LOSSES | {"selection": selection}
    compare(made(model_folder, data_folder, tmp_path, adapter=adapter))


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"router_aux_loss_coef": 0.7, "router_aux_loss_scope": "micro_batch"}},
        {"adapter": {"router_aux_loss_coef": 0.7, "rotation": "tangent"}},
        {"training": {"label_smoothing_factor": 0.2}},
    ],
    ids=["micro_batch", "by hand", "smoothed"],
)
def test_packs_learn_the_same_under_other_settings(changes, model_folder, data_folder, tmp_path):
    compare(made(model_folder, data_folder, tmp_path, **changes))


def test_packs_learn_the_same_under_eager_attention(model_folder, data_folder, tmp_path):
    """Its softmax is in float32."""
    eager = {"attn_implementation": "eager"}
    compare(made(model_folder, data_folder, tmp_path, model=eager, adapter=LOSSES), rtol=1e-5)


def test_experts_choose_among_the_tokens_of_a_row(built):
    """Not for models that write, so no run file has it: a model without an output layer."""
    config = RotMoleConfig(
        r=4, num_experts=3, selection="expert_choice", top_k=1, init_weights=False,
        target_modules=["q_proj", "v_proj"], router_aux_loss_coef=0.7,
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(tiny.llama(vocab_size=320).model, config).double()

    def gradients(batch: dict[str, Any]) -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        given = {n: v for n, v in model_inputs(batch).items() if n not in ("labels", "task_id")}
        states = model(**given, use_cache=False).last_hidden_state
        states[batch["attention_mask"].bool()].exp().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    made_of = batches(built)
    wanted = gradients(made_of.pop("padded"))
    assert wanted
    for batch in made_of.values():
        torch.testing.assert_close(gradients(batch), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["packs", "flat"])
def test_no_row_sees_another_one(built, kind):
    """Change the first row of each sequence: no logit of another row moves."""
    batch = batches(built)[kind]
    other = dict(batch)
    first = (batch["seq_idx"] == 0) if kind == "packs" else (batch["seq_idx"] < 2)
    other["input_ids"] = torch.where(first, (batch["input_ids"] + 1) % 90, batch["input_ids"])
    with torch.no_grad():
        logits = [
            built.model(**{n: v for n, v in model_inputs(b).items() if n != "labels"}).logits
            for b in (batch, other)
        ]
    moved = (logits[0] != logits[1]).any(-1)
    rest = (batch["seq_idx"] > 0) if kind == "packs" else (batch["seq_idx"] >= 2)
    assert moved[first].all()
    assert not moved[rest].any()


def test_the_first_token_of_a_row_is_not_learnt_from_the_row_before(built):
    for kind, batch in batches(built).items():
        starts = batch["labels"][:, 1:][batch.get("position_ids", batch["labels"])[:, 1:] == 0]
        assert kind == "padded" or (starts.numel() and bool((starts == -100).all()))


@pytest.mark.parametrize("kind", ["packs", "packs to a multiple", "flat"])
def test_routing_is_recorded_once_a_token_and_by_its_own_task(built, kind):
    def recorded(batch: dict[str, Any]) -> Any:
        names = ["colours", "sums"]
        with record_routing(built.model, tasks=names) as log, torch.no_grad():
            built.model(**{n: v for n, v in model_inputs(batch).items() if n != "labels"})
        return log

    made_of = batches(built)
    ours, wanted = recorded(made_of[kind]), recorded(made_of["padded"])
    assert set(ours.tasks) == set(wanted.tasks) == {"colours", "sums"}
    for path, layer in wanted.layers.items():
        for task, statistics in layer.tasks.items():
            mine = ours.layers[path].tasks[task]
            assert mine.rows == statistics.rows
            assert torch.equal(mine.choices_E, statistics.choices_E), (path, task)
        choices = sum(int(t.choices_E.sum()) for t in layer.tasks.values())
        assert choices == 2 * int(made_of["padded"]["attention_mask"].sum())


@pytest.mark.parametrize("kind", ["packs", "packs to a multiple", "flat"])
def test_validation_sums_each_row(built, kind):
    made_of = batches(built)
    wanted = built.trainer.prediction_step(built.model, made_of["padded"], False)
    ours = built.trainer.prediction_step(built.model, made_of[kind], False)
    for mine, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=0)
    labels = made_of["padded"]["labels"][:, 1:]
    with torch.no_grad():
        logits = built.model(input_ids=made_of["padded"]["input_ids"]).logits[:, :-1]
    each = cross_entropy(logits.mT.float(), labels, reduction="none").sum(1)
    torch.testing.assert_close(wanted[1].float(), each, rtol=1e-4, atol=1e-4)


def test_a_second_look_at_a_failed_batch_sees_rows_apart(built):
    batch = batches(built)["packs"]
    layer = built.model.get_base_model().model.layers[1].mlp
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, out: seen.append(out))
    try:
        assert first_nonfinite(built.model, batch) is None
        with torch.no_grad():
            built.model(**{n: v for n, v in model_inputs(batch).items() if n != "labels"})
    finally:
        handle.remove()
    assert torch.equal(*seen)


@pytest.mark.parametrize("setting", ["packing", "padding_free"])
def test_a_model_that_mixes_rows_is_refused(setting, data_folder, tmp_path, model_folder):
    words = AutoTokenizer.from_pretrained(model_folder)
    sizes = dict.fromkeys(("hidden_size", "word_embed_proj_dim"), 32)
    config = OPTConfig(
        **sizes, vocab_size=len(words), num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
        max_position_embeddings=64, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    folder = tiny_folders.write_pair(words, OPTForCausalLM(config), tmp_path / "opt")
    raw = settings(folder, data_folder, tmp_path / "run", **{setting: True})
    with pytest.raises(ModelError, match="opt with attention 'sdpa' lets them see each other"):
        build(load_run(None, text=yaml.safe_dump(raw)))


@pytest.mark.parametrize("setting", ["packing", "padding_free"])
@pytest.mark.slow
def test_a_run_counts_every_row_once(setting, model_folder, data_folder, tmp_path):
    """One epoch: its tokens, its validation by task, and the rows of an update by name."""
    results = {}
    for name, more in {"apart": {}, "together": {setting: True}}.items():
        run = run_file(
            model_folder, data_folder, tmp_path / name, "adapter.lora_dropout=0",
            max_steps=-1, num_train_epochs=1.0, eval_steps=0.5, save_steps=0.5,
            learning_rate=0.0, **more,
        )  # fmt: skip
        results[name] = train(run, progress=False)
    apart, together = (results[name].metrics for name in ("apart", "together"))
    assert together["num_input_tokens_seen"] == apart["num_input_tokens_seen"]
    for loss in ("eval_loss", "eval_colours_loss", "eval_sums_loss"):
        assert together[loss] == pytest.approx(apart[loss], rel=1e-5)
    trainer = results["together"].built.trainer
    updates = results["together"].steps
    named = [row["id"] for step in range(updates) for row in trainer.rows_of_update(step)]
    rows = results["apart"].built.trainer.train_dataset
    assert sorted(named) == sorted(rows["id"])
    assert (updates < results["apart"].steps) == (setting == "packing")


def test_what_a_run_file_may_not_say(model_folder, data_folder, tmp_path):
    wrong = {
        "needs training.max_length": {"packing": True, "max_length": None},
        "must be bfd": {"packing": True, "packing_strategy": "wrapped"},
        "pad_to_multiple_of has no meaning": {"padding_free": True, "pad_to_multiple_of": 8},
    }
    for told, training in wrong.items():
        with pytest.raises(ConfigError, match=told):
            run_file(model_folder, data_folder, tmp_path, **training)
    idle = {
        "train_sampling_strategy has no effect, because packs": {
            "packing": True, "train_sampling_strategy": "group_by_length",
        },
        "packing_strategy has no effect": {"packing_strategy": "bfd"},
    }  # fmt: skip
    for told, training in idle.items():
        with pytest.warns(UserWarning, match=told):
            run_file(model_folder, data_folder, tmp_path, **training)


def test_a_resume_knows_whether_rows_were_joined(model_folder, data_folder, tmp_path):
    """Off it has no name, as in checkpoints from before there was packing."""
    plain = facts_of(run_file(model_folder, data_folder, tmp_path))
    joined = facts_of(run_file(model_folder, data_folder, tmp_path, packing=True))
    assert {name for name in joined if joined[name] != plain.get(name)} == {"training.packing"}
    assert "training.packing" not in plain


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's
@pytest.mark.slow
def test_a_compiled_model_knows_the_task_of_each_packed_row(built):
    """While tracing, how many rows a batch of packs has is not known."""
    batch = batches(built)["packs"]

    def routers(model: Any) -> list[torch.Tensor]:
        built.model.zero_grad(set_to_none=True)
        inputs = {name: v for name, v in model_inputs(batch).items() if name != "labels"}
        model(**inputs, use_cache=False).logits.mul(0).sum().backward()
        named = built.model.named_parameters()
        return [p.grad for name, p in named if name.endswith("router_weight")]

    wanted = routers(built.model)
    torch.testing.assert_close(routers(torch.compile(built.model, backend="eager")), wanted)
