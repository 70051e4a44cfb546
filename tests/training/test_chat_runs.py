"""Runs on chats: the date they were rendered on, what ends their answers, and going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import rotmole.training.build as building
import tiny_folders
from checkpoint_cases import checkpoint
from rotmole.config.schema import DataSection
from rotmole.data import chat_prompt, data_fingerprint, turn_end
from rotmole.data.chat import today
from rotmole.errors import InputError
from rotmole.evaluation import generate_text
from rotmole.evaluation.target import find_target, load_target
from rotmole.training.build import Sources
from rotmole.training.changes import check_answers, loaded_facts
from rotmole.training.folder.manifest import run_date
from rotmole.training.run import train
from training_cases import run_file

TURN = "<|eot|>"  # the end of a turn, which is not the tokenizer's end of sequence
TEMPLATE = (
    "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}"
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + 'END\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def base(folder: Path, end: str) -> Path:
    words = tiny_folders.tokenizer(specials=[TURN], size=300, pad_token=tiny_folders.END)
    words.chat_template = TEMPLATE.replace("END", end)
    return tiny_folders.write_pair(words, tiny_folders.llama(words, initializer_range=0.1), folder)


def chats(folder: Path) -> Path:
    turns = [
        {"role": "user", "content": "film?"}, {"role": "assistant", "content": "good"},
        {"role": "user", "content": "blue?"}, {"role": "assistant", "content": "good"},
    ]  # fmt: skip
    rows: list[dict[str, Any]] = [{"messages": turns}, {"messages": turns[:2]}]
    return tiny_folders.write_rows(folder / "chat.jsonl", rows)


def chat_run(folder: Path, end: str, *overrides: str, **training: Any):
    task = f"{{source: jsonl, files: {{train: '{chats(folder)}'}}, format: messages}}"
    defaults = {"max_steps": 45, "save_steps": 15, "max_length": 128, "learning_rate": 5e-2}
    run = run_file(folder / "model", folder, folder / "run", *overrides, **(defaults | training))
    run.data = DataSection(tasks={"chat": yaml.safe_load(task)})
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of yesterday that learnt to say good and to end there."""
    folder = tmp_path_factory.mktemp("chat")
    base(folder / "model", TURN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "today", lambda: "2025-02-03")
        train(chat_run(folder, TURN), progress=False)
    return folder


@pytest.mark.slow
def test_the_date_belongs_to_the_run(finished: Path) -> None:
    manifest = json.loads((finished / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["date"] == run_date(finished / "run") == "2025-02-03"
    for path in ("run", "run/adapter", "run/checkpoint-15"):
        assert find_target(finished / path).date == "2025-02-03"
    # today the rows are those of that day, so nothing has changed
    result = train(chat_run(finished, TURN, max_steps=45), resume="auto", progress=False)
    assert result.built.date == "2025-02-03"
    assert "Today: 03 Feb 2025" in result.built.examples["train"]["chat"][0].prompt
    assert run_date(finished / "run") == "2025-02-03"


@pytest.mark.parametrize(
    ("kept", "date"),
    [
        ('{"started": "2025-06-07T12:00:00+00:00"}', "2025-06-07"),  # as 0.1.0 wrote it
        ('{"date": "2025-06-07"}', "2025-06-07"),
        ('{"date": "yesterday"}', None),
        ("[]", None),
        ("{", None),
    ],
)
def test_manifests_without_a_date(tmp_path: Path, kept: str, date: str | None) -> None:
    (tmp_path / "manifest.json").write_text(kept, encoding="utf-8")
    assert run_date(tmp_path) == (date or today())
    assert run_date(tmp_path / "nowhere") == today()


@pytest.mark.parametrize("end", [TURN, "##"])
def test_answers_end_where_they_ended_in_training(finished: Path, tmp_path: Path, end: str) -> None:
    folder = finished
    if end != TURN:
        folder = tmp_path
        base(folder / "model", end)
        train(chat_run(folder, end, max_steps=45), progress=False)
    kept = GenerationConfig.from_pretrained(folder / "run" / "adapter")
    words = AutoTokenizer.from_pretrained(folder / "model")
    mark = (folder / "run" / "adapter" / "chat_template.jinja").read_text(encoding="utf-8")
    assert mark == words.chat_template
    assert turn_end(words) == end
    if end == TURN:
        assert kept.eos_token_id == sorted([words.eos_token_id, words.convert_tokens_to_ids(TURN)])
    else:
        assert kept.stop_strings == ["##"]
    loaded = load_target(find_target(folder / "run" / "adapter"))
    assert loaded.model.generation_config.eos_token_id == kept.eos_token_id
    question = [{"role": "user", "content": "film?"}]
    prompt = chat_prompt(words, question, date=run_date(folder / "run"))
    assert generate_text(loaded.model, words, prompt, max_new_tokens=12).strip() == "good"

    # as a user of PEFT alone does it
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = PeftModel.from_pretrained(model, folder / "run" / "adapter").eval()
    inputs = words(prompt.rstrip(" "), return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        output = model.generate(
            **inputs, generation_config=kept, tokenizer=words, max_new_tokens=12
        )
    written = words.decode(output[0, inputs["input_ids"].shape[1] :]).strip()
    assert written == f"good{end}"


def test_a_run_that_learnt_last_answers_is_named(finished: Path, tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(finished / "model")
    run = chat_run(finished, TURN)
    every = Sources().examples(run, words, "2025-02-03")
    run.data.tasks["chat"].loss_on = "last"
    last = Sources().examples(run, words, "2025-02-03")
    place = checkpoint(tmp_path, 5, **loaded_facts(data_fingerprint(run.data, last), torch.float32))
    with pytest.raises(InputError, match=r"learns all answers\. Set data\.tasks\.chat\.loss_on"):
        check_answers(place, every["train"])
    check_answers(place, last["train"])
    place = checkpoint(
        tmp_path, 6, **loaded_facts(data_fingerprint(run.data, every), torch.float32)
    )
    check_answers(place, every["train"])
