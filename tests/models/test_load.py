from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BertConfig, BertModel

import rotmole
import tiny_folders
from rotmole.config.schema import ModelSection
from rotmole.errors import ConfigError, ModelError
from rotmole.models.load import empty_model, explain, load_config, load_model, load_tokenizer
from rotmole.models.precision import (
    bfloat16_is_faster,
    choose_device,
    choose_dtype,
    quantization_config,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with its tokenizer; tests only read it."""
    return tiny_folders.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A tiny Llama in a GGUF file with 8-bit weights and a tied head; tests only read it."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_folders.write_gguf(path)
    return path


def section(name, **settings):
    return ModelSection(name=str(name), **({"dtype": "float32", "device": "cpu"} | settings))


def logits(model):
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_a_folder_gives_the_saved_weights(folder):
    loaded = load_model(section(folder))
    expected = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded.model), logits(expected))
    assert loaded.name == str(folder)
    assert loaded.note is None
    assert not loaded.model.training


def test_the_dtype_is_the_one_asked_for(folder):
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = load_model(section(folder, dtype=name)).model
        assert {p.dtype for p in model.parameters()} == {dtype}


def test_auto_is_settled_by_the_probe():
    automatic = ModelSection(name="x", device="cpu")
    faster = bfloat16_is_faster()
    assert choose_dtype(automatic, torch.device("cpu")) is (
        torch.bfloat16 if faster else torch.float32
    )
    assert choose_dtype(automatic, torch.device("mps")) is torch.float32


def test_attention_implementation(folder):
    model = load_model(section(folder, attn_implementation="eager")).model
    assert model.config._attn_implementation == "eager"


def test_a_device_map(folder):
    model = load_model(section(folder, device_map={"": "cpu"})).model
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_missing_device_is_named():
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(
        ModelError, match=rf"'{absent}' is not available on this machine, which has .*cpu"
    ):
        choose_device(ModelSection(device=absent))


def test_a_pad_token_without_touching_the_vocabulary(folder):
    words = load_tokenizer(section(folder))
    assert words.pad_token_id == words.eos_token_id
    model = load_model(section(folder)).model
    assert model.get_input_embeddings().weight.shape[0] == len(words)
    assert model.config.pad_token_id == words.pad_token_id
    assert model.generation_config.pad_token_id == words.pad_token_id


def test_an_empty_model_holds_no_memory(folder):
    model = empty_model(section(folder), torch.bfloat16)
    real = load_model(section(folder)).model
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    shapes = {name: p.shape for name, p in real.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_file_trains_and_saves_like_any_model(gguf_file, tmp_path, dtype):
    loaded = load_model(section(gguf_file, dtype=dtype))
    model = loaded.model
    assert not model.is_quantized
    assert getattr(model.config, "quantization_config", None) is None
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))

    adapted = get_peft_model(
        model, rotmole.RotMoleConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    ids = torch.arange(24).reshape(2, 12)
    adapted(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)
    model.requires_grad_(True)
    ids = loaded.tokenizer("the film is good", return_tensors="pt")
    adapted(**ids, labels=ids.input_ids).loss.backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_a_gguf_file_holds_the_weights_that_went_in(tmp_path):
    path = tmp_path / "tiny.gguf"
    original = tiny_folders.write_gguf(path)
    model = load_model(section(path)).model
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), original.named_parameters(), strict=True
    ):
        step = theirs.abs().max() / 127  # of 8 bits
        assert (ours - theirs).abs().max() <= step, name


def test_a_head_that_repeats_the_embedding_is_tied_again(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_folders.write_gguf(path, repeat_head=True)
    model = load_model(section(path)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))


def test_a_head_of_its_own_stays_untied(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_folders.write_gguf(path, tied=False)
    model = load_model(section(path)).model
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_the_gguf_tokenizer_is_the_one_that_went_in(gguf_file):
    ours, theirs = load_tokenizer(section(gguf_file)), tiny_folders.tokenizer()
    for text in [*tiny_folders.SENTENCES, "größe 12 日本"]:
        assert ours(text).input_ids == theirs(text).input_ids
    assert ours.eos_token == tiny_folders.END
    assert load_config(section(gguf_file)).vocab_size == len(theirs)


def test_quantisation_and_gguf_do_not_mix(gguf_file, monkeypatch):
    monkeypatch.setattr("rotmole.models.load.quantization_config", lambda *_: object())
    with pytest.raises(ModelError, match="cannot be used with the GGUF file"):
        load_model(section(gguf_file, quantization="bnb-8bit"))


@pytest.mark.parametrize("kind", ["bnb-8bit", "bnb-4bit-nf4", "torchao-int8"])
def test_a_missing_quantiser_is_named(kind, monkeypatch):
    monkeypatch.setattr("rotmole.models.precision.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"{kind} needs .* pip install 'rotmole\[quant\]'"):
        quantization_config(ModelSection(quantization=kind), torch.float32)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/no/such/folder", "no such folder"),
        ("./missing", "no such folder"),
        ("missing.gguf", "no such file"),
    ],
)
def test_a_missing_path_is_said_without_asking_the_hub(name, words):
    with pytest.raises(ModelError, match=words):
        load_model(section(name))


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"hub cannot be reached .*HF_HUB_OFFLINE.*smollm2-135m"):
        load_model(section("organisation/name-that-is-not-there"))


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match="is a file; give the folder"):
        load_model(section(tmp_path / "notes.txt"))


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 something else"])
def test_a_gguf_file_that_is_none(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelError, match="not a GGUF file"):
        load_model(section(tmp_path / "x.gguf"))


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_a_gguf_file_cut_short(gguf_file, tmp_path, share):
    content = gguf_file.read_bytes()
    (tmp_path / "x.gguf").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError, match="broken, incomplete"):
        load_model(section(tmp_path / "x.gguf"))


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(section(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter, not a model"):
        load_model(section(tmp_path))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_with_a_broken_file(folder, tmp_path, file):
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="broken, incomplete"):
        load_model(section(copy))


def test_missing_weights_are_never_left_at_random(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors .*layers\.1\.mlp\.up_proj"):
        load_model(section(copy))


def test_an_encoder_without_a_language_head(tmp_path):
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=300,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path)
    tiny_folders.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="would get random values"):
        load_model(section(tmp_path))


def test_a_tokenizer_of_another_model(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    words = tiny_folders.tokenizer()
    words.add_tokens(["more", "words"])
    words.save_pretrained(copy)
    with pytest.raises(ModelError, match=r"token \d+, but the model embeds only"):
        load_model(section(copy))


def test_a_tokenizer_without_an_end(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(file.read_text()).items() if k != "eos_token"}
    file.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_tokenizer(section(copy))


def test_foreign_code_is_not_run(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    settings = json.loads((copy / "config.json").read_text())
    settings |= {"model_type": "foreign", "auto_map": {"AutoConfig": "evil.Config"}}
    (copy / "config.json").write_text(json.dumps(settings))
    (copy / "evil.py").write_text("raise SystemExit('foreign code ran')")
    with pytest.raises(ModelError, match="not run unless you add --trust-remote-code"):
        load_config(section(copy))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory"),
        (OSError("You are trying to access a gated repo. 401"), "requires permission"),
        (OSError("x" * 1000), "Check the spelling"),
    ],
)
def test_reasons(error, words):
    text = explain(error, ModelSection(name="org/name"), "model")
    assert words in text
    assert len(text) < 700
