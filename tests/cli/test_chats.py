"""Chats through the command line: what check says of them, and what eval makes of wrong answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny_folders
from rotmole_cli import main

THINKING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + THINKING
)
TURNS = [
    {"role": "user", "content": "good film?"},
    {"role": "assistant", "content": "hi"},
] * 2


def run_file(folder: Path, template: str, *rows: list[dict[str, str]]) -> str:
    words = tiny_folders.tokenizer()
    words.chat_template = template
    tiny_folders.write_pair(words, tiny_folders.llama(words), folder / "model")
    tiny_folders.write_rows(folder / "chat.jsonl", [{"messages": row} for row in rows])
    file = folder / "run.yaml"
    file.write_text(
        f"output_dir: {folder}/run\n"
        f"model: {{name: {folder}/model, dtype: float32, device: cpu}}\n"
        "adapter: {r: 2, num_experts: 2, target_modules: [q_proj]}\n"
        f"data: {{root: {folder}, tasks: {{chat: {{source: jsonl, format: messages,"
        " files: {train: chat.jsonl, validation: chat.jsonl}}}}\n"
        "evaluation: {max_new_tokens: 8, batch_size: 2}\n",
        encoding="utf-8",
    )
    return str(file)


def test_check_counts_the_answers(tmp_path, capsys):
    assert main(["check", run_file(tmp_path, THINKING, TURNS, TURNS[:2])]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    (columns,) = (line for line in shown if line[:2] == ["task", "split"])
    (train,) = (line for line in shown if line[:2] == ["chat", "train"])
    assert dict(zip(columns, train, strict=True))["answers"] == "3"


@pytest.mark.parametrize("command", ["check", "train", "eval"])
def test_a_template_that_refuses_a_chat(tmp_path, capsys, command):
    system = {"role": "system", "content": "Be brief."}
    file = run_file(tmp_path, REFUSING, TURNS, [system, *TURNS])
    assert main([command, file]) == 2
    shown = capsys.readouterr()
    assert "chat.jsonl: row 2: the model's chat template refuses this chat: System role" in (
        shown.err
    )
    assert "the row begins: " in shown.err
    assert "Traceback" not in shown.err


def test_wrong_answers_score_nothing(tmp_path, capsys):
    assert main(["eval", run_file(tmp_path, THINKING, TURNS), "--json"]) == 0
    text = capsys.readouterr().out
    metrics = json.loads(text)["systems"]["base"]["tasks"]["chat"]["metrics"]
    assert metrics["exact_match"]["value"] == 0
