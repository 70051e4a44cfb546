"""Experts imported from trained PEFT LoRA adapters: what they compute, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from rotmole import AdapterError, ConfigError, ModelError, RotMoleConfig, RotMoleModel
from rotmole.tuner.layer import RotMoleLayer

IDS = tiny.tokens(2, 7)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def save_lora(folder: Path, seed: int = 0, **settings: object) -> torch.Tensor:
    """Save a LoRA adapter whose B is not zero; return the logits with it."""
    torch.manual_seed(seed)
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    config = LoraConfig(**(fields | {"task_type": "CAUSAL_LM"} | settings))
    model = get_peft_model(tiny.llama(), config)
    model.save_pretrained(folder)
    return logits(model)


def layers(model: PeftModel) -> dict[str, RotMoleLayer]:
    base = model.get_base_model()
    return {name: m for name, m in base.named_modules() if isinstance(m, RotMoleLayer)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two adapters that differ in rank, alpha, rsLoRA, patterns and modules."""
    root = tmp_path_factory.mktemp("loras")
    save_lora(root / "first", 1, lora_alpha=6, rank_pattern={"layers.1.self_attn.v_proj": 2})
    save_lora(
        root / "second", 2, r=3, use_rslora=True, target_modules=["q_proj", "down_proj"],
        alpha_pattern={"down_proj": 5},
    )  # fmt: skip
    return root / "first", root / "second"


@pytest.mark.parametrize("settings", [
    {}, {"use_rslora": True, "lora_alpha": 3}, {"alpha_pattern": {"v_proj": 5}},
    {"rank_pattern": {"v_proj": 2}},
], ids=str)  # fmt: skip
def test_one_adapter_and_dense_routing_is_that_adapter(
    settings: dict[str, object], tmp_path: Path
) -> None:
    expected = save_lora(tmp_path, **settings)
    model = RotMoleModel.from_adapters(tiny.llama(), [tmp_path], selection="dense")
    assert (logits(tiny.llama()) - expected).abs().max() > 1e-2
    assert (logits(model) - expected).abs().max() < 1e-6


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Return what a LoRA adapter adds to each weight, by PEFT's own account."""
    model = PeftModel.from_pretrained(tiny.llama(), folder)
    named = model.get_base_model().named_modules()
    return {n: m.get_delta_weight("default") for n, m in named if hasattr(m, "get_delta_weight")}


@pytest.mark.parametrize("trainable", ["gates", "all"])
def test_expert_e_is_adapter_e_and_adds_nothing_where_that_has_no_module(
    two: tuple[Path, Path], trainable: str
) -> None:
    model = RotMoleModel.from_adapters(tiny.llama(), two, trainable=trainable)
    wanted = [deltas(folder) for folder in two]
    adapted = layers(model)
    assert adapted.keys() == wanted[0].keys() | wanted[1].keys()
    assert {e.experts("default").expert_A.shape[1] for e in adapted.values()} == {2, 3, 4}
    for name, layer in adapted.items():
        experts = layer.experts("default")
        for number, delta in enumerate(wanted):
            product = experts.spec.scale * (experts.expert_A[number].T @ experts.expert_B[number]).T
            expected = delta.get(name, torch.zeros_like(product))
            torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("trainable", ["gates", "all"])
def test_it_trains_what_was_asked_for_and_reloads_bit_equal(
    two: tuple[Path, Path], trainable: str, tmp_path: Path
) -> None:
    model = RotMoleModel.from_adapters(tiny.llama(), two, trainable=trainable, top_k=2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    gates = {n for n in before if "router_weight" in n or "rotation_vector" in n}
    experts = {n for n in before if "expert_A" in n or "expert_B" in n}
    assert moved == gates | (experts if trainable == "all" else set())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.llama(), tmp_path)), expected)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained == moved


def test_all_experts_can_learn_where_an_adapter_had_no_module(two: tuple[Path, Path]) -> None:
    """A zero expert has B = 0 and a drawn A; with both zero it would have no gradient at all."""
    model = RotMoleModel.from_adapters(tiny.llama(), two, trainable="all", selection="dense")
    model(input_ids=IDS, labels=IDS).loss.backward()
    down = layers(model)["model.layers.0.mlp.down_proj"].experts("default")
    assert not down.expert_B[0].any()
    assert down.expert_B.grad[0].any()


def test_routed_scaling_factor_multiplies_the_sum_of_the_adapters(two: tuple[Path, Path]) -> None:
    adapted = layers(RotMoleModel.from_adapters(tiny.llama(), two, routed_scaling_factor=2.0))
    for name, layer in layers(RotMoleModel.from_adapters(tiny.llama(), two)).items():
        plain, doubled = layer.experts("default"), adapted[name].experts("default")
        assert doubled.spec.scale == 2 * plain.spec.scale
        torch.testing.assert_close(doubled.expert_B, plain.expert_B)


def test_experts_are_named_by_their_folders_or_as_was_said(two: tuple[Path, Path]) -> None:
    def names(*paths: Path, **options: object) -> list[str]:
        model = RotMoleModel.from_adapters(tiny.llama(), paths, **options)
        return list(model.peft_config["default"].expert_names)

    assert names(*two) == ["first", "second"]
    assert names(two[0], two[0]) == ["first", "first-2"]
    assert names(*two, names=["math", "code"]) == ["math", "code"]
    for wrong, words in ((["a"], "1 names but num_experts is 2"), (["a", "a"], "different names")):
        with pytest.raises(ConfigError, match=words):
            names(*two, names=wrong)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "alpha_pattern": {"v_proj": 5}}])
def test_a_mixture_of_one_expert_without_rotation_is_an_adapter_too(
    settings: dict[str, object], two: tuple[Path, Path], tmp_path: Path
) -> None:
    torch.manual_seed(3)
    config = RotMoleConfig(
        r=3, num_experts=1, rotation="none", init_weights=False, target_modules=["v_proj"],
        **settings,
    )  # fmt: skip
    single = get_peft_model(tiny.llama(), config)
    single.save_pretrained(tmp_path / "run" / "adapter")
    paths = [tmp_path / "run"]
    model = RotMoleModel.from_adapters(tiny.llama(), paths, selection="dense")
    assert (logits(single) - logits(tiny.llama())).abs().max() > 1e-3
    assert (logits(model) - logits(single)).abs().max() < 1e-6
    both = RotMoleModel.from_adapters(tiny.llama(), [*paths, two[0]])
    assert both.peft_config["default"].expert_names == ["run", "first"]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"num_experts": 2}, "num_experts is 2"),
        ({"rotation": "plane"}, "rotation is 'plane'"),
        ({"shared_expert_r": 2}, "shared_expert_r is 2"),
        ({"init_weights": "svd"}, "init_weights is 'svd'"),
    ],
    ids=["experts", "rotation", "shared", "svd"],
)
def test_mixtures_that_are_more_than_one_lora_are_refused_by_name(
    settings: dict[str, object], word: str, tmp_path: Path
) -> None:
    fields = {"r": 3, "num_experts": 1, "rotation": "none", "target_modules": ["v_proj"]}
    get_peft_model(tiny.llama(), RotMoleConfig(**(fields | settings))).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=word):
        RotMoleModel.from_adapters(tiny.llama(), [tmp_path])


def test_an_adapter_of_the_hub_is_fetched_by_its_id(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(two[0] / file)

    monkeypatch.setattr("rotmole.tuner.loras.hf_hub_download", fetch)
    model = RotMoleModel.from_adapters(tiny.llama(), ["me/math", two[1]])
    assert model.peft_config["default"].expert_names == ["math", "second"]
    files = ("adapter_config.json", "adapter_model.safetensors")
    assert asked == [("me/math", file) for file in files]
    with pytest.raises(AdapterError, match="no such folder; give a folder"):
        RotMoleModel.from_adapters(tiny.llama(), ["nothing"])
    monkeypatch.undo()
    with pytest.raises(AdapterError, match="cannot be fetched from the hub"):
        RotMoleModel.from_adapters(tiny.llama(), ["me/nothing"])


def test_the_problems_of_all_adapters_are_said_at_once(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    save_lora(tmp_path, bias="lora_only")
    with pytest.raises(AdapterError, match=r"2 problems:(?s:.*)bias is(?s:.*)'nothing': there is"):
        RotMoleModel.from_adapters(tiny.llama(), [two[0], tmp_path, "nothing"])
    with pytest.raises(ModelError, match=r"2 problems:(?s:.*)more modules\)(?s:.*)second"):
        RotMoleModel.from_adapters(tiny.llama(hidden_size=16, num_attention_heads=2), two)


REFUSED: list[tuple[dict[str, object], str]] = [
    ({"use_dora": True}, "use_dora"),
    ({"bias": "lora_only"}, "bias is 'lora_only'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ({"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(("settings", "word"), REFUSED, ids=[word for _, word in REFUSED])
def test_what_no_expert_can_express_is_refused_by_name(
    settings: dict[str, object], word: str, tmp_path: Path
) -> None:
    save_lora(tmp_path, **settings)
    with pytest.raises(AdapterError, match=word):
        RotMoleModel.from_adapters(tiny.llama(), [tmp_path])


def test_damaged_and_foreign_folders_are_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    def refused(match: str, **changes: object) -> None:
        folder = tmp_path / match.rsplit(maxsplit=1)[-1]
        shutil.copytree(two[0], folder)
        for name, content in changes.items():
            file = folder / name.replace("__", ".")
            if content is None:
                file.unlink()
            elif isinstance(content, dict):
                old = json.loads(file.read_text(encoding="utf-8"))
                file.write_text(json.dumps(old | content), encoding="utf-8")
            else:
                content(file)
        with pytest.raises(AdapterError, match=match):
            RotMoleModel.from_adapters(tiny.llama(), [two[1], folder])

    def spoil(file: Path) -> None:
        tensors = load_file(file)
        next(iter(tensors.values()))[0, 0] = float("nan")
        save_file(tensors, file)

    def shorten(file: Path) -> None:
        tensors = load_file(file)
        del tensors[max(tensors)]
        save_file(tensors, file)

    weights, config = "adapter_model__safetensors", "adapter_config__json"
    refused("has no adapter_model", **{weights: None})
    refused("is damaged", **{weights: lambda file: file.write_bytes(b"12345678")})
    refused("not finite", **{weights: spoil})
    unknown = "newer_than_all is 3 .rotmole does not know"
    refused(unknown, **{config: {"newer_than_all": 3}})
    refused("lora_B.weight is missing", **{weights: shorten})
    refused("peft_type is 'LOHA'", **{config: {"peft_type": "LOHA"}})
    refused("use_bdlora", **{config: {"use_bdlora": {"a": 1}}})
    (tmp_path / "pickled").mkdir()
    shutil.copy(two[0] / "adapter_config.json", tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match="pickle files can run code"):
        RotMoleModel.from_adapters(tiny.llama(), [tmp_path / "pickled"])


def test_another_base_and_settings_that_the_adapters_decide_are_refused(
    two: tuple[Path, Path],
) -> None:
    with pytest.raises(ModelError, match=r"features .* in 'model.layers.0.self_attn.q_proj'"):
        RotMoleModel.from_adapters(tiny.llama(hidden_size=16, num_attention_heads=2), two)
    with pytest.raises(ModelError, match="does not have"):
        RotMoleModel.from_adapters(tiny.gpt2(), two)
    for settings, word in (
        ({"r": 4}, "r cannot be set"),
        ({"share_A": True}, "share_A cannot be set"),
        ({"trainable": "some"}, "trainable is 'some'"),
        ({"top_k": 3}, "top_k is 3"),
    ):
        with pytest.raises(ConfigError, match=word):
            RotMoleModel.from_adapters(tiny.llama(), two, **settings)
    with pytest.raises(ConfigError, match="list of at least one"):
        RotMoleModel.from_adapters(tiny.llama(), str(two[0]))
    model = RotMoleModel.from_adapters(tiny.llama(), two)
    with pytest.raises(ModelError, match="PeftModel already"):
        RotMoleModel.from_adapters(model, two)
