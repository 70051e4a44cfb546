"""rotmole inspect as a user runs it: what it says first, what it writes, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rotmole.inspection.inspection import Inspection
from rotmole_cli import main
from training_cases import settings, write_data, write_model

WEIGHTS = "adapter_model.safetensors"
PATH = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates, in which experts 0 and 2 of one layer are made equal."""
    root = tmp_path_factory.mktemp("inspect")
    model, data = write_model(root / "model"), root / "data"
    data.mkdir()
    content = settings(
        model, write_data(data), root / "run", max_steps=2, save_steps=2, eval_steps=2
    )
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["train", str(path)]) == 0
    weights = root / "run" / "adapter" / WEIGHTS
    tensors = load_file(weights)
    for name in tensors:
        if PATH in name and name.endswith(("expert_A", "expert_B", "rotation_vector")):
            tensors[name][2] = tensors[name][0]
    save_file(tensors, weights, metadata={"format": "pt"})
    return root / "run"


def test_the_verdict_comes_first_then_tables_that_fit_the_screen(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, figures = tmp_path / "out", tmp_path / "figures"
    words = ["inspect", str(run), "-o", str(output), "--limit", "150", "--figures", str(figures)]
    assert main(words) == 0
    said = capsys.readouterr().out
    first, second, *_ = said.splitlines()
    assert first.endswith("tokens show.")
    assert second.startswith("! ")
    assert (
        "duplicate experts in 1 of 4 layers: 1 q_proj: experts 0 and 2 are alike to 1.000." in said
    )
    assert "rotmole prune --similarity" in said
    assert "validation rows" in said
    tables = [line for line in said.splitlines() if "  " in line.strip()]
    assert len(tables) > 10
    assert max(map(len, tables)) <= 80
    found = Inspection.read(output / "inspect.json")
    named = {verdict.name: verdict for verdict in found.verdicts}
    assert named["duplicate experts"].layers == (PATH,)
    assert found.source.tokens.keys() == {"colours", "sums"}
    assert found.source.curves["all"][0][0] == 2
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "experts 0 and 2 are alike" in page
    assert {file.suffix for file in figures.iterdir()} == {".svg", ".pdf"}
    assert not (run / "inspect.json").exists()


def test_a_text_is_shown_token_by_token_and_nothing_is_written(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inspect", str(run / "adapter"), "--text", "red 0 then red", "--layer", "1.*q_proj"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "weights and |angles|, averaged over layers" in said
    assert f"weights and angles in {PATH}" in said
    rows = said.split(PATH)[1].splitlines()[1:]
    assert rows[0].split() == ["token", "expert", "0", "expert", "1", "expert", "2"]
    assert "no files are written for a text alone" in said
    assert "tokens are too few to judge the use of the experts" in said
    assert not (run / "inspect.json").exists()
    assert not (run / "report.html").exists()


def test_a_file_with_rows_is_looked_at_too(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, adapter, output = tmp_path / "text.txt", tmp_path / "adapter", tmp_path / "out"
    text.write_text("red 0 then\n\nred 1 then blue\n\nred 2 then", encoding="utf-8")
    shutil.copytree(run / "adapter", adapter)
    assert main(["inspect", str(adapter), "--file", str(text), "-o", str(output)]) == 0
    found = Inspection.read(output / "inspect.json")
    assert found.source.rows == "the text"
    assert found.passage is not None
    assert "".join(found.passage.tokens).strip() == "red 0 then"
    assert found.static is not None  # fitted on every second passage
    words = ["--data", str(run / "run.yaml"), "--text", "red", "--limit", "60"]
    assert main(["inspect", str(adapter), *words]) == 0
    found = Inspection.read(adapter / "inspect.json")
    assert found.source.rows == "validation rows"
    assert found.passage is not None
    capsys.readouterr()


def test_runs_stand_beside_each_other_also_of_other_methods(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "lora"
    shutil.copytree(run, other)
    shutil.rmtree(other / "adapter")
    base = yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))["model"]["name"]
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained(str(other / "adapter"))
    output = tmp_path / "out"
    words = ["inspect", str(run), str(run), str(other), "--limit", "60", "-o", str(output)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count("to mend") == 2  # of the two mixtures
    page = (output / "report.html").read_text(encoding="utf-8")
    assert str(other) in page
    assert main(["inspect", str(other)]) == 2
    assert "is a LORA adapter, which has no experts of rotmole" in capsys.readouterr().err


def test_what_cannot_be_looked_at_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "adapter", adapter)
    cases = [
        ([str(adapter)], "there are no rows to look at; add --data RUN.yaml, --text or --file"),
        ([str(run), "--layer", "q_proj"], "add --text or --file"),
        ([str(run), "--text", "red red", "--layer", "k_proj"], "names no adapted layer"),
        ([str(run), "--file", str(tmp_path / "no.txt")], "cannot be read as UTF-8 text"),
        ([str(run), "--text", " "], "has no two tokens"),
        ([str(run), "--text", "a", "--file", "b"], "it has no effect with --text"),
        ([str(tmp_path / "nothing")], "there is no file or folder"),
    ]
    for words, sentence in cases:
        assert main(["inspect", *words]) == 2, words
        assert sentence in capsys.readouterr().err, words


def test_json_holds_no_number_that_is_none(run: Path, tmp_path: Path) -> None:
    assert main(["inspect", str(run), "--limit", "60", "-o", str(tmp_path)]) == 0
    text = (tmp_path / "inspect.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    json.loads(text)
