from __future__ import annotations

import io
import json
import shutil

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from rotmole.cli.generate import Sampling, generate
from rotmole.cli.prompts import read_prompts
from rotmole.errors import AdapterError, InputError
from rotmole_cli import main
from tiny_folders import write_base_model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter that names its base by path; tests only read it."""
    folder = tmp_path_factory.mktemp("shared")
    write_base_model(folder / "model")
    base = LlamaForCausalLM.from_pretrained(folder / "model")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def test_a_prompt_streamed_or_not(adapter, capsys):
    assert generate(adapter, "the film", sampling=Sampling(8)) == 0
    streamed = capsys.readouterr().out
    assert generate(adapter, "the film", sampling=Sampling(8), stream=False) == 0
    assert capsys.readouterr().out == streamed
    assert streamed.strip()


def test_sampling_is_seeded(adapter, capsys):
    texts = []
    for seed in (1, 1, 2):
        generate(adapter, "the film", sampling=Sampling(12, 2.0, seed=seed))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def texts(prompts) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_a_file_is_one_prompt_or_one_a_line(adapter, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("the film\n\nis\u2028 bad\n", encoding="utf-8")
    assert texts(read_prompts(None, file)) == ["the film\n\nis\u2028 bad"]
    assert texts(read_prompts(None, file, lines=True)) == ["the film", "is\u2028 bad"]
    generate(adapter, file=file, lines=True, sampling=Sampling(4), stream=False)
    both = capsys.readouterr().out
    singles = []
    for prompt in ("the film", "is\u2028 bad"):
        generate(adapter, prompt, sampling=Sampling(4), stream=False)
        singles.append(capsys.readouterr().out)
    assert both == "\n".join(singles)
    generate(adapter, file=file, lines=True, sampling=Sampling(4))
    assert capsys.readouterr().out == both


def test_standard_input_is_one_prompt_or_one_a_line(adapter, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("the film\n is\n"))
    assert main(["generate", str(adapter), "--max-new-tokens", "4"]) == 0
    piped = capsys.readouterr().out
    generate(adapter, "the film\n is", sampling=Sampling(4))
    assert capsys.readouterr().out == piped
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n\nb\n"))
    assert texts(read_prompts(None, None, lines=True)) == ["a", "b"]


def test_a_prompt_and_a_file_are_too_much(adapter, tmp_path):
    with pytest.raises(InputError, match="not both"):
        generate(adapter, "a", tmp_path / "b")


def test_no_prompt_at_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    with pytest.raises(InputError, match="there is no prompt"):
        read_prompts(None, None)


def test_unreadable_prompts(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(None, tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xe4\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        read_prompts(None, tmp_path / "latin.txt")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(InputError, match="contains no prompt"):
        read_prompts(None, None)


def test_a_setting_without_effect_is_named(adapter, capsys):
    with pytest.warns(UserWarning, match="top_p has no effect"):
        generate(adapter, "a", sampling=Sampling(1, top_p=0.5))


def test_an_adapter_that_names_no_base(adapter, tmp_path):
    nameless = tmp_path / "nameless"
    shutil.copytree(adapter, nameless)
    file = nameless / "adapter_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"base_model_name_or_path": None}
    file.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(AdapterError, match="does not name its base model"):
        generate(nameless, "a")
