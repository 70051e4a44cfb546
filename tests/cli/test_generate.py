from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaForCausalLM

from rotmole.cli.generate.answers import AnswerFile
from rotmole.cli.generate.command import Sampling, generate
from rotmole.cli.generate.prompts import read_prompts
from rotmole.errors import AdapterError, InputError
from rotmole_cli import main
from tiny_folders import write_base_model, write_model, write_rows


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


@pytest.fixture
def rows(tmp_path) -> Path:
    """Prompts of different lengths with keys of their own."""
    return write_rows(
        tmp_path / "rows.jsonl",
        [
            {"id": i, "prompt": "the film " * (1 + i % 3) + "is", "tags": {"n": [i]}}
            for i in range(7)
        ],
    )


def answers_in(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_rows_of_jsonl_in_batches_equal_one_by_one(adapter, rows, tmp_path, capsys):
    words = ["generate", str(adapter), "-f", str(rows), "--max-new-tokens", "6"]
    file = tmp_path / "new" / "answers.jsonl"
    assert main([*words, "--batch-size", "3", "--output", str(file)]) == 0
    screen = capsys.readouterr()
    assert screen.out == f"written: {file} (7 answers)\n"
    assert "prompts 0/7" in screen.err
    assert "prompts 7/7" in screen.err
    found = answers_in(file)
    for row, given in zip(found, answers_in(rows), strict=True):
        assert list(row) == ["id", "prompt", "tags", "generated_text", "finish_reason"]
        assert {key: row[key] for key in given} == given
        generate(adapter, given["prompt"], sampling=Sampling(6))
        assert capsys.readouterr().out == row["generated_text"] + "\n"
    assert {row["finish_reason"] for row in found} <= {"stop", "length"}
    assert main(words) == 0  # without --output on standard output
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found


def test_sampled_answers_depend_on_prompt_and_seed_alone(adapter, rows, tmp_path, capsys):
    texts = []
    for name, size in (("a", 1), ("b", 5)):
        sampling = Sampling(6, temperature=2.0, seed=3)
        file = tmp_path / name
        generate(adapter, file=rows, output=file, batch_size=size, sampling=sampling)
        texts.append([row["generated_text"] for row in answers_in(file)])
    assert texts[0] == texts[1]
    assert texts[0][0] == texts[0][3]  # the same prompt
    capsys.readouterr()
    generate(adapter, "the film is", sampling=sampling)
    assert capsys.readouterr().out == texts[0][0] + "\n"


def half_done(adapter, rows: Path, file: Path, monkeypatch) -> None:
    """Leave two answers and a part of the third, as a kill does."""
    real = AnswerFile.add

    def add(self, new):
        real(self, new)
        if self.done == 2:
            self._stream.write(b'{"id": 2, "pro')
            self._stream.flush()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "add", add)
        words = ["generate", str(adapter), "-f", str(rows), "--output", str(file)]
        assert main([*words, "--max-new-tokens", "6", "--batch-size", "1"]) == 130


def test_an_interrupted_output_is_continued(adapter, rows, tmp_path, monkeypatch, capsys):
    file, whole = tmp_path / "half.jsonl", tmp_path / "whole.jsonl"
    half_done(adapter, rows, file, monkeypatch)
    said = capsys.readouterr().err
    assert f"2 of 7 answers are in {file}; the same command goes on from there." in said
    generate(adapter, file=rows, output=whole, sampling=Sampling(6))
    generate(adapter, file=rows, output=file, sampling=Sampling(6), batch_size=4)
    assert file.read_bytes() == whole.read_bytes()
    assert sorted(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("change", ["setting", "rows", "adapter"])
def test_an_output_of_other_settings_or_rows_is_refused(
    adapter, rows, tmp_path, monkeypatch, change
):
    file, other, number = tmp_path / "half.jsonl", adapter, 6
    half_done(adapter, rows, file, monkeypatch)
    before = file.read_bytes()
    match = "row 1 is no answer to prompt 1; choose another --output"
    if change == "setting":
        number, match = 5, r"was begun with max_new_tokens 6 \(now 5\); choose another --output"
    elif change == "rows":
        write_rows(rows, [{"prompt": "another"}] * 7)
    else:
        other, match = tmp_path / "adapter", r"was begun with adapter \w+ \(now \w+\)"
        shutil.copytree(adapter, other)
        weights = load_file(other / "adapter_model.safetensors")
        save_file({n: t + 1 for n, t in weights.items()}, other / "adapter_model.safetensors")
    with pytest.raises(InputError, match=match):
        generate(other, file=rows, output=file, sampling=Sampling(number))
    assert file.read_bytes() == before


def test_a_complete_output_is_not_replaced(adapter, rows, tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    generate(adapter, file=rows, output=file, sampling=Sampling(2))
    before = file.read_bytes()
    with pytest.raises(InputError, match="holds 7 answers already; choose another --output"):
        generate(adapter, file=rows, output=file, sampling=Sampling(2))
    assert file.read_bytes() == before
    file.write_bytes(b"".join(before.splitlines(keepends=True)[:3]))  # shortened by hand
    generate(adapter, file=rows, output=file, sampling=Sampling(2))
    assert file.read_bytes() == before
    assert "holds 3 answers, but not the settings" in capsys.readouterr().err
    with pytest.raises(InputError, match="is the file of the prompts"):
        generate(adapter, file=rows, output=rows)


def test_faults_of_all_rows_are_said_at_once(tmp_path):
    lines = [
        '{"prompt": "a"}',
        '{"text": "a"}',
        "{",
        '{"prompt": 1}',
        '{"prompt": "a", "messages": []}',
    ]
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_prompts(None, file)
    for number in (2, 3, 4, 5):
        assert f"row {number}" in str(caught.value)
    with pytest.raises(InputError, match="leave --lines out"):
        read_prompts(None, file, lines=True)
    write_rows(file, [{"prompt": "a", "generated_text": "b"}])
    with pytest.raises(InputError, match="has 'generated_text', which the answer would replace"):
        generate(tmp_path, file=file)


CHAT = """\
output_dir: {folder}
model: {{name: {model}, dtype: float32, device: cpu}}
data:
  root: /nowhere
  tasks:
    talk: {{source: jsonl, files: {{train: gone.jsonl}}, format: messages}}
"""


@pytest.fixture(scope="module")
def talk(tmp_path_factory) -> Path:
    """A run folder of chats whose template writes `user: ... assistant: `."""
    folder = tmp_path_factory.mktemp("talk")
    write_model(folder / "model", initializer_range=0.3)
    base = LlamaForCausalLM.from_pretrained(folder / "model")
    run = folder / "run"
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(run / "adapter")
    text = CHAT.format(folder=run, model=folder / "model")
    (run / "run.yaml").write_text(text, encoding="utf-8")
    (run / "manifest.json").write_text("{}", encoding="utf-8")
    return run


def printed(capsys, *arguments, **options) -> str:
    generate(*arguments, sampling=Sampling(6), **options)
    return capsys.readouterr().out


def test_a_chat_run_answers_through_its_template(talk, capsys):
    rendered = printed(capsys, talk, "user: the film\nassistant: ", chat=False)
    assert printed(capsys, talk, "the film") == rendered
    assert printed(capsys, talk / "adapter", "the film") == rendered
    assert printed(capsys, talk, "the film", chat=False) != rendered
    told = "system: the bad\nuser: the film\nassistant: "
    asked = printed(capsys, talk, "the film", system="the bad")
    assert asked == printed(capsys, talk, told, chat=False)
    with pytest.raises(InputError, match="--system needs the chat template; add --chat"):
        generate(talk, "the film", system="the bad", chat=False)


def test_an_adapter_alone_is_a_chat_if_a_template_lies_beside_it(talk, tmp_path, capsys):
    alone = tmp_path / "alone"
    shutil.copytree(talk / "adapter", alone)
    rendered = printed(capsys, alone, "the film", chat=True)
    plain = printed(capsys, alone, "the film", chat=False)
    assert printed(capsys, alone, "the film") == plain != rendered
    (alone / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert printed(capsys, alone, "the film") == rendered


def test_rows_of_chats_of_several_turns(talk, tmp_path, capsys):
    turns = [("user", "the film"), ("assistant", "good"), ("user", "red")]
    openai = [{"role": role, "content": text} for role, text in turns]
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[role], "value": text} for role, text in turns]
    file = write_rows(tmp_path / "chats.jsonl", [{"messages": openai}, {"messages": sharegpt}])
    rendered = "user: the film\nassistant: good\nuser: red\nassistant: "
    expected = printed(capsys, talk, rendered, chat=False)
    rows = printed(capsys, talk, file=file).splitlines()
    assert [json.loads(row)["generated_text"] + "\n" for row in rows] == [expected] * 2
    with pytest.raises(InputError, match=r"row 1 is a chat, .*; leave --raw out"):
        generate(talk, file=file, chat=False)
    write_rows(file, [{"messages": openai[:2]}])
    with pytest.raises(InputError, match=r"row 1: the last message is the assistant's"):
        generate(talk, file=file)


def test_without_a_chat_template(adapter, tmp_path):
    file = write_rows(tmp_path / "c.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(InputError, match="no chat template"):
        generate(adapter, file=file)
    with pytest.raises(InputError, match="no chat template"):
        generate(adapter, "a", chat=True)


def test_what_ends_answers_is_honoured_and_not_shown(adapter, tmp_path, capsys):
    whole = printed(capsys, adapter, "the film", stream=False)
    word = whole.strip()[2]
    ended = tmp_path / "ended"
    shutil.copytree(adapter, ended)
    GenerationConfig(eos_token_id=0, stop_strings=[word]).save_pretrained(ended)
    expected = whole.partition(word)[0] + "\n"
    assert printed(capsys, ended, "the film", stream=False) == expected
    assert printed(capsys, ended, "the film") == expected
