from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from rotmole.cli.eval.command import evaluate
from rotmole.errors import AdapterError, ConfigError, DataError, InputError
from rotmole_cli import main
from tiny_folders import write_base_model

RUN = """\
output_dir: {folder}/run
seed: 3
model: {{name: {folder}/model, dtype: float32, device: cpu}}
data:
  root: {folder}
  tasks:
    film:
      source: jsonl
      files: {{train: film.jsonl, validation: film.jsonl}}
      group_column: lang
    mood:
      source: jsonl
      files: {{validation: mood.jsonl}}
      format: classification
      prompt: "{{text}} is"
      completion: " {{choice}}"
      labels: [bad, good]
      metrics: [accuracy, matthews]
evaluation: {{max_new_tokens: 3, batch_size: 4}}
"""


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_adapter(folder: Path, target: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    model.save_pretrained(target)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A model, data, a run file, and a lone adapter; tests only read it."""
    folder = tmp_path_factory.mktemp("shared")
    write_base_model(folder / "model")
    save_adapter(folder, folder / "lone")
    film = [
        {"prompt": f"film {i} is", "completion": " good", "lang": "en" if i % 2 else "de"}
        for i in range(6)
    ]
    write_lines(folder / "film.jsonl", film)
    write_lines(folder / "mood.jsonl", [{"text": f"x{i}", "label": i % 2} for i in range(6)])
    (folder / "run.yaml").write_text(RUN.format(folder=folder), encoding="utf-8")
    return folder


@pytest.fixture
def place(shared, tmp_path) -> Path:
    """A run file of its own output folder, so that results of tests do not meet."""
    text = RUN.format(folder=shared).replace(f"{shared}/run", f"{tmp_path}/run")
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def trained(place: Path, shared: Path) -> Path:
    """A run folder as training leaves it."""
    save_adapter(shared, place / "run" / "adapter")
    (place / "run" / "run.yaml").write_text((place / "run.yaml").read_text(), encoding="utf-8")
    return place / "run"


def test_an_untrained_run_file_scores_the_base(place, capsys):
    assert evaluate(place / "run.yaml") == 0
    printed = capsys.readouterr().out
    result = json.loads((place / "run" / "eval.json").read_text(encoding="utf-8"))
    assert list(result["systems"]) == ["base"]
    assert result["adapter"] is None
    assert list(result["systems"]["base"]["tasks"]) == ["film", "mood"]
    assert set(result["systems"]["base"]["tasks"]["film"]["groups"]) == {"de", "en"}
    assert list(result["systems"]["base"]["tasks"]["mood"]["metrics"]) == ["accuracy", "matthews"]
    assert "exact_match" in printed
    assert "eval.json" in printed
    assert "\x1b" not in printed


def test_a_run_folder_shows_before_beside_after(place, shared, capsys):
    folder = trained(place, shared)
    assert evaluate(folder) == 0
    result = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    before, after = result["systems"]["before"], result["systems"]["after"]
    assert before["tasks"] != after["tasks"]
    assert result["differences"]["after"]["to"] == "before"
    header = capsys.readouterr().out.splitlines()[0].split()
    assert header == ["task", "group", "metric", "rows", "before", "after", "difference"]
    assert evaluate(place / "run.yaml") == 0  # the same through the run file
    again = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    for system in [*result["systems"].values(), *again["systems"].values()]:
        del system["seconds"]
    assert again == result


def test_any_adapter_with_a_run_file_for_the_data(shared, place, tmp_path):
    save_adapter(shared, tmp_path / "lone")
    assert evaluate(tmp_path / "lone", config=place / "run.yaml", limit=1) == 0
    result = json.loads((tmp_path / "lone" / "eval.json").read_text(encoding="utf-8"))
    assert result["settings"]["limit"] == 1
    film = result["systems"]["after"]["tasks"]["film"]["metrics"]["exact_match"]
    assert film["n"] == 2  # one of each language


def test_json_on_standard_output(place, capsys):
    assert evaluate(place / "run.yaml", as_json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((place / "run" / "eval.json").read_text(encoding="utf-8"))


def test_worked_examples_come_from_train(place, capsys):
    overrides = ["evaluation.examples_in_prompt=2", "data.tasks.mood.files.train=mood.jsonl"]
    assert evaluate(place / "run.yaml", overrides) == 0
    assert "examples_in_prompt 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("adapter.r=2", "evaluated as it was saved"),
        ("training.learning_rate=1e-3", "nothing is trained"),
        ("optimizer.lora_plus_ratio=4", "nothing is trained"),
    ],
)
def test_an_override_that_cannot_act_is_told(place, override, reason):
    with pytest.warns(UserWarning, match=f"{override} has no effect on eval, because .*{reason}"):
        assert evaluate(place / "run.yaml", [override, "evaluation.limit=1"]) == 0


def test_a_split_that_only_some_tasks_have(place):
    with pytest.warns(UserWarning, match="without rows in split 'train' are left out: mood"):
        assert evaluate(place / "run.yaml", split="train") == 0


def test_a_split_that_no_task_has(place):
    with pytest.raises(ConfigError, match="no task has rows in split 'test'"):
        evaluate(place / "run.yaml", split="test")


def test_an_unknown_split(place):
    with pytest.raises(ConfigError, match=r"evaluation\.split"):
        evaluate(place / "run.yaml", split="tset")


def test_an_adapter_alone_needs_data(shared, tmp_path):
    save_adapter(shared, tmp_path / "far" / "lone")
    with pytest.raises(ConfigError, match=r"is not in a run folder, .* add --config"):
        evaluate(tmp_path / "far" / "lone")
    with pytest.raises(ConfigError, match=r"'evaluation\.limit=3' changes a run file"):
        evaluate(tmp_path / "far" / "lone", limit=3)


def test_a_run_folder_without_adapter(place):
    (place / "run").mkdir()
    (place / "run" / "run.yaml").write_text((place / "run.yaml").read_text(), encoding="utf-8")
    with pytest.raises(AdapterError, match="contains no adapter"):
        evaluate(place / "run")


def test_a_metric_that_does_not_fit_is_told_before_the_model_loads(place):
    wrong = ["data.tasks.film.metrics=[matthews]", "model.name=/no/such/model"]
    with pytest.raises(ConfigError, match="'matthews' needs choices"):
        evaluate(place / "run.yaml", wrong)


@pytest.mark.parametrize(
    "what", ["missing", "empty", "truncated", "pickle", "tensor", "other model"]
)
def test_broken_adapters_are_one_sentence(place, shared, what):
    folder = trained(place, shared)
    weights = folder / "adapter" / "adapter_model.safetensors"
    overrides = []
    if what == "missing":
        weights.unlink()
    elif what == "empty":
        weights.write_bytes(b"")
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "tensor":
        tensors = load_file(weights)
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, weights)
    elif what == "pickle":
        weights.rename(weights.with_name("adapter_model.bin"))
    else:
        write_base_model(place / "wide")
        config = LlamaConfig.from_pretrained(place / "wide")
        config.hidden_size, config.head_dim = 64, 32
        LlamaForCausalLM(config).save_pretrained(place / "wide")
        overrides = [f"model.name={place}/wide"]
    with pytest.raises(AdapterError) as caught:
        evaluate(folder, overrides)
    assert str(folder / "adapter") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_path_is_guessed(place):
    with pytest.raises(InputError, match=r"did you mean .*run\.yaml"):
        evaluate(place / "run.yml")
    (place / "other").mkdir()
    with pytest.raises(InputError, match=r"neither run\.yaml nor adapter_config\.json"):
        evaluate(place / "other")


def test_bad_data_is_exit_2(place, shared, capsys):
    write_lines(place / "film.jsonl", [{"prompt": "a"}])
    override = f"data.tasks.film.files.validation={place}/film.jsonl"
    with pytest.raises((ConfigError, DataError)):
        evaluate(place / "run.yaml", [override])
    assert main(["eval", str(place / "run.yaml"), override]) == 2
    assert "film.jsonl" in capsys.readouterr().err


def test_the_command_line(place, capsys):
    assert main(["eval", str(place / "run.yaml"), "--limit", "1"]) == 0
    assert "overall" in capsys.readouterr().out


def predictions(folder: Path) -> list[dict]:
    text = (folder / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_every_row_can_be_looked_into(place, shared):
    folder = trained(place, shared)
    assert evaluate(folder) == 0
    rows = predictions(folder)
    assert [row["task"] for row in rows] == ["film"] * 6 + ["mood"] * 6
    first, last = rows[0], rows[-1]
    assert (first["prompt"], first["reference"]) == ("film 0 is", " good")
    assert first["origin"].endswith("film.jsonl: row 1")
    assert list(first["systems"]) == ["before", "after"]
    assert list(first["systems"]["after"]["metrics"]) == ["exact_match", "perplexity"]
    assert last["choices"] == [" bad", " good"]
    assert len(last["systems"]["before"]["log_likelihoods"]) == 2
    result = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    for name, system in result["systems"].items():
        right = [row["systems"][name]["metrics"]["accuracy"] for row in rows[6:]]
        assert sum(right) / 6 == system["tasks"]["mood"]["metrics"]["accuracy"]["value"]


def test_some_tasks_only(place, capsys):
    assert main(["eval", str(place / "run.yaml"), "--task", "mood", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["systems"]["base"]["tasks"]) == ["mood"]
    words = ["eval", str(place / "run.yaml"), "--task", "mod", "--task", "film", "--task", "x"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "--task mod: there is no such task; did you mean 'mood'?" in said
    assert "--task x: there is no such task; the tasks are film, mood" in said


def test_results_in_another_folder(place, shared):
    folder = trained(place, shared)
    assert evaluate(folder, limit=1, output=place / "new" / "scores") == 0
    assert {path.name for path in (place / "new" / "scores").iterdir()} == {
        "eval.json", "predictions.jsonl",
    }  # fmt: skip
    assert not (folder / "eval.json").exists()


@pytest.mark.parametrize("where", ["file in place of the folder", "folder in place of the file"])
def test_where_nothing_can_be_written_the_table_is_printed(place, where, capsys):
    target = place / "scores"
    if where.startswith("file"):
        target.touch()
    else:
        (target / "eval.json").mkdir(parents=True)
    assert main(["eval", str(place / "run.yaml"), "--output", str(target), "--limit", "1"]) == 4
    screen = capsys.readouterr()
    assert "overall" in screen.out
    begin, *_, end = screen.err.splitlines()
    assert "The figures will be printed only; --output DIR writes them elsewhere." in begin
    assert end.startswith("rotmole: cannot write ")
    assert "Traceback" not in screen.err


def test_validation_that_chose_the_checkpoint_is_named(place, shared, capsys):
    folder = trained(place, shared)
    text = "training: {eval_strategy: steps, eval_steps: 2, save_strategy: steps, save_steps: 4}\n"
    run = folder / "run.yaml"
    run.write_text(run.read_text(encoding="utf-8") + text, encoding="utf-8")
    assert evaluate(folder, limit=1) == 0
    said = capsys.readouterr().out
    assert "validation rows chose this checkpoint" in said
    assert "a test split would not be" in said
    assert json.loads((folder / "eval.json").read_text())["chosen_on_these_rows"] is True
    more = ["data.tasks.film.files.test=film.jsonl"]
    assert evaluate(folder, more, limit=1) == 0
    assert "--split test scores others" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="left out: mood"):
        assert evaluate(folder, more, limit=1, split="test") == 0
    text = run.read_text(encoding="utf-8").replace("save_steps: 4", "load_best_model_at_end: false")
    run.write_text(text, encoding="utf-8")
    assert evaluate(folder, limit=1) == 0
    assert "chose this checkpoint" not in capsys.readouterr().out


def long_rows(place: Path, rows: str = "cut") -> list[str]:
    """Overrides that give the task film one row of more than 10,000 tokens."""
    row = {"prompt": "the film is bad " * 2500 + "film is", "completion": " good", "lang": "en"}
    write_lines(place / "long.jsonl", [row])
    file = f"data.tasks.film.files.validation={place}/long.jsonl"
    return [file, f"data.tasks.film.long_rows={rows}", "training.max_length=48"]


def test_long_rows_are_cut_in_eval_as_in_training(place, monkeypatch, capsys):
    lengths = []
    forward = LlamaForCausalLM.forward

    def seen(self, input_ids=None, **kwargs):
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", seen)
    words = ["eval", str(place / "run.yaml"), *long_rows(place), "--task", "film"]
    assert main(words) == 0
    assert max(lengths) <= 48
    screen = capsys.readouterr()
    assert "rows whose prompt was cut (long_rows): film 1" in screen.out
    assert "training.max_length=48" not in screen.err  # it has an effect
    assert "base: likelihoods 0/1" in screen.err.splitlines()
    (row,) = predictions(place / "run")
    assert row["cut"] is True


def test_a_row_too_long_for_training_is_refused_in_eval(place, capsys):
    words = ["eval", str(place / "run.yaml"), *long_rows(place, "error")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "long.jsonl: row 1: 12503 tokens are" in said
    assert "more than training.max_length 48" in said
    assert "likelihoods" not in said
