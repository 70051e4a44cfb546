"""PEFT's own functions on an adapter of ours: as with LoRA, or a sentence that says what to do."""

from __future__ import annotations

import gc
import os
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, convert_to_lora, get_layer_status, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from transformers import DynamicCache, StaticCache

import tiny
from rotmole import ModelError, RotMoleConfig
from rotmole.tuner.layer import Linear


def adapted(**settings: Any) -> PeftModel:
    config = RotMoleConfig(
        **({"r": 4, "target_modules": ["q_proj"], "init_weights": False} | settings)
    )
    return get_peft_model(tiny.llama(), config)


REFUSED: dict[str, tuple[Callable[[PeftModel], object], str]] = {
    "add_weighted_adapter": (
        lambda m: m.add_weighted_adapter(["default"], [1.0], "c"), "from_adapters",
    ),
    "unmerge_adapter": (lambda m: m.unmerge_adapter(), "disable_adapter"),
    "merge_adapter": (lambda m: m.merge_adapter(), "keep the adapter"),
    "merge_and_unload": (lambda m: m.merge_and_unload(), "keep the adapter"),
    "subtract_mutated_init": (
        lambda m: m.base_model.subtract_mutated_init({}, "default"), "saves it whole",
    ),
    "adapter_names": (lambda m: m(input_ids=tiny.tokens(1, 3), adapter_names=["default"]), "rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_mixture_cannot_do_says_what_to_do_and_changes_nothing(name: str) -> None:
    model, ids = adapted().eval(), tiny.tokens(2, 5)
    before = model(input_ids=ids).logits
    call, words = REFUSED[name]
    with pytest.raises(ModelError, match=words):
        call(model)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_what_peft_offers_for_lora_alone_is_refused_by_peft_in_words(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only supports LORA but ROTMOLE was passed"):
        hotswap_adapter(model, str(tmp_path), "default")
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    with pytest.raises((ValueError, AttributeError)):  # peft 0.20 has no words for it
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path))
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=4)


TIED: list[dict[str, Any]] = [
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"trainable_token_indices": {"embed_tokens": [1, 2]}},
]


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("fields", TIED, ids=str)
def test_tied_embeddings_are_treated_as_by_lora(fields: dict[str, Any], tie: bool) -> None:
    found = []
    for config in (LoraConfig, RotMoleConfig):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            copies = {name: type(value)(value) for name, value in fields.items()}
            model = get_peft_model(
                tiny.llama(tie_word_embeddings=True),
                config(r=4, target_modules=["q_proj"], ensure_weight_tying=tie, **copies),
            )
        both = [
            (n, id(p))
            for n, p in model.named_parameters(remove_duplicate=False)
            if p.requires_grad and ("embed" in n or "lm_head" in n)
        ]
        tied = len({number for _, number in both})
        messages = [str(w.message) for w in said if "deprecated" not in str(w.message)]
        found.append(([name for name, _ in both], tied, messages))
    assert found[0] == found[1]
    assert found[1][1] == (2 if not tie and len(fields.get("modules_to_save", ())) == 2 else 1)


@pytest.mark.parametrize("tie", [False, True])
def test_an_adapter_with_tied_embeddings_comes_back(tie: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = RotMoleConfig(
            r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"],
            ensure_weight_tying=tie, init_weights=False,
        )  # fmt: skip
        model = get_peft_model(tiny.llama(tie_word_embeddings=True), config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter))
        ids = tiny.tokens(2, 5)
        wanted = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny.llama(tie_word_embeddings=True), tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, wanted)


def test_a_pickle_is_never_left_behind(tmp_path: Path) -> None:
    model, ids = adapted().eval(), tiny.tokens(2, 5)
    with pytest.warns(UserWarning, match="was saved as adapter_model.safetensors"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_model.bin").exists()
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("first", [True, False])
def test_a_second_save_leaves_no_older_weights(first: bool, tmp_path: Path) -> None:
    model, ids = adapted().eval(), tiny.tokens(2, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, safe_serialization=first)
        for parameter in model.parameters():
            parameter.data.mul_(1 + 0.5 * parameter.requires_grad)
        model.save_pretrained(tmp_path, safe_serialization=False)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_an_old_pickle_beside_new_weights_does_not_replace_them(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"old")
    os.utime(tmp_path / "adapter_model.bin", (1, 1))
    adapted().save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.bin").read_bytes() == b"old"


def test_others_can_read_what_the_umask_lets_them_read(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", RotMoleConfig(r=2, target_modules=["v_proj"], init_weights=False))
    before = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 10
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}


@pytest.mark.filterwarnings("ignore:Could not find a config file in org/model:UserWarning")
def test_a_card_says_how_the_adapter_is_loaded_and_names_no_folder(tmp_path: Path) -> None:
    base = tiny.llama()
    base.save_pretrained(tmp_path / "base")
    for name in ("org/model", str(tmp_path / "base")):
        base.config._name_or_path = base.name_or_path = name
        config = RotMoleConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        for _ in range(2):
            model.save_pretrained(tmp_path / "adapter")
        card = ModelCard.load(tmp_path / "adapter" / "README.md")
        model.unload()
        assert card.text.count("import rotmole\n") == 1
        assert str(tmp_path) not in card.content
        assert card.data.library_name == "peft"
        assert card.data.pipeline_tag == "text-generation"
        assert {"peft", "rotmole"} <= set(card.data.tags)
        assert card.data.base_model == (name if name == "org/model" else None)
        (tmp_path / "adapter" / "README.md").unlink()
    model = get_peft_model(base, config, adapter_name="other")
    model.save_pretrained(tmp_path / "named")
    assert "import rotmole" in (tmp_path / "named" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "named")
    get_peft_model(model.unload(), config).save_pretrained(tmp_path / "adapter")
    config.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_other_adapters_of_one_model_are_saved_without_a_pickle_too(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", RotMoleConfig(r=2, target_modules=["v_proj"], init_weights=False))
    with pytest.warns(UserWarning, match="safetensors"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    files = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("adapter_model.*")}
    assert files == {"adapter_model.safetensors", "other/adapter_model.safetensors"}


@pytest.mark.parametrize("how", ["peft", "transformers", "unload"])
@pytest.mark.filterwarnings("ignore:Adapter default was active:UserWarning")
def test_an_adapter_that_is_deleted_frees_its_memory_at_once(how: str) -> None:
    """Also while a generation that used it has its cache still."""
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_weights": False}
    if how == "transformers":
        model: Any = tiny.llama()
        model.add_adapter(RotMoleConfig(**fields), adapter_name="default")
        delete = model.delete_adapter
    else:
        model = adapted(**fields)
        model.add_adapter("other", RotMoleConfig(**fields))
        delete = model.delete_adapter if how == "peft" else lambda name: model.unload()
    model.eval()
    with torch.no_grad():
        cache = model(input_ids=tiny.tokens(2, 5), use_cache=True).past_key_values
        for _ in range(2):
            model(input_ids=tiny.tokens(2, 1), past_key_values=cache)
    held = [
        weakref.ref(p) for n, p in model.named_parameters() if "rotmole" in n and ".default." in n
    ]
    storages = {p().untyped_storage().data_ptr() for p in held}
    assert len(held) >= 8
    delete("default")
    assert not [one for one in held if one() is not None]
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) is torch.Tensor]
    assert not [t for t in alive if t.untyped_storage().data_ptr() in storages]
    assert cache is not None


def test_weights_overwritten_behind_autograds_back_are_used_at_once() -> None:
    """As an average of weights writes them: through .data, without a new version."""
    model = adapted(target_modules=["q_proj", "v_proj", "down_proj"]).double().eval()
    ids = tiny.tokens(2, 6)

    def decoded(run: Callable[..., Any]) -> torch.Tensor:
        with torch.no_grad():
            cache = run(input_ids=ids[:, :-1], use_cache=True).past_key_values
            return run(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]

    def whole(run: Callable[..., Any]) -> torch.Tensor:
        with torch.no_grad():
            return run(input_ids=ids).logits[:, -1]

    def check(run: Callable[..., Any]) -> torch.Tensor:
        logits = whole(run)
        assert torch.allclose(decoded(run), logits, rtol=0, atol=1e-12)
        return logits

    before = check(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data.mul_(1.5)
    after = check(model)
    assert not torch.allclose(after, before)
    new = {name: parameter.detach() * 1.5 for name, parameter in trained.items()}
    called = check(lambda **kwargs: torch.func.functional_call(model, new, kwargs=kwargs))
    assert not torch.allclose(called, after)
    for parameter in trained.values():
        parameter.data.copy_(torch.zeros_like(parameter))
    assert not torch.allclose(check(model), after)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for parameter in trained.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    check(model)


REUSED = [(kind, first) for kind in ("static", "dynamic", "cropped") for first in (3, 1)]


@pytest.mark.parametrize(("kind", "first"), REUSED)
def test_a_cache_that_serves_a_second_generation_holds_nothing_of_the_first(
    kind: str, first: int
) -> None:
    model = adapted(target_modules=["q_proj", "down_proj"]).double().eval()
    ids = tiny.tokens(2, 5)
    cache: Any = DynamicCache()
    if kind == "static":
        cache = StaticCache(config=model.base_model.model.config, max_cache_len=8)

    def decoded() -> torch.Tensor:
        if kind != "cropped":
            cache.reset()
        if kind != "static" and cache.get_seq_length():
            # older transformers' reset() leaves a dynamic cache as long as it was
            cache.crop(-cache.get_seq_length())
        with torch.no_grad():
            for piece in (ids[:, :first], *ids[:, first:].split(1, 1)):
                logits = model(input_ids=piece, past_key_values=cache).logits
        return logits[:, -1]

    decoded()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "rotmole" in name:
            parameter.data.mul_(1.5)
    wanted = model(input_ids=ids).logits[:, -1]
    assert torch.allclose(decoded(), wanted, rtol=0, atol=1e-12)


def test_a_quantised_base_layer_is_shown() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = tiny.llama()
    layer = base.model.layers[0].self_attn
    layer.q_proj = bnb.nn.Linear8bitLt(32, 32, bias=False, has_fp16_weights=False)
    model = get_peft_model(base, RotMoleConfig(r=4, target_modules=["q_proj", "v_proj"]))
    first = next(m for m in model.modules() if isinstance(m, Linear))
    assert first.quantization_backend is not None
    assert f"quantization_backend='{first.quantization_backend.backend_name}'" in repr(first)
    status = {s.name.rpartition(".")[2]: s.quantization_backend for s in get_layer_status(model)}
    assert status["v_proj"] is None
    assert "quantization_backend" not in repr(layer.v_proj)
