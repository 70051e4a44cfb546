from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rotmole
from fake_hub import TOKEN, fake_hub
from rotmole.tuner.experts.experts import Experts
from rotmole_cli import main
from tiny_folders import write_base_model, write_rows

RUN = """\
output_dir: {folder}/run
model: {{name: {folder}/model, dtype: float32, device: cpu}}
data:
  root: {folder}
  tasks:
    film: {{source: jsonl, files: {{train: train.jsonl, test: test.jsonl}}}}
evaluation: {{max_new_tokens: 3, batch_size: 4, split: test}}
"""
WORDS = ["the", "film", "is", "good", "bad", "red", "blue", "green", "black", "white"]


def save_adapter(place: Path, target: Path, seed: int = 5, **settings: object) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    wanted = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "down_proj"]}
    model = get_peft_model(base, rotmole.RotMoleConfig(**(wanted | settings)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Experts):
                for parameter in module.parameters():
                    parameter.normal_(0, 0.2, generator=generator)
    model.save_pretrained(target)
    return model.eval()


def write_run(folder: Path, place: Path, **settings: object) -> Path:
    """A run folder as training leaves it."""
    save_adapter(place, folder / "adapter", **settings)
    text = RUN.format(folder=place).replace(f"{place}/run", str(folder))
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows; tests only read them."""
    folder = tmp_path_factory.mktemp("export")
    write_base_model(folder / "model")
    for split, start in (("train", 0), ("test", 40)):
        rows = [
            {"prompt": f"{WORDS[i % 10]} {WORDS[i % 7]} is", "completion": f" {WORDS[i % 9]}"}
            for i in range(start, start + 40)
        ]
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", place, num_experts=3, rotation="tangent")


# What a machine without rotmole does, and it writes the logits.
ELSEWHERE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("rotmole", "rotmole_cli"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2]).eval().double()
ids = torch.arange(24).reshape(2, 12)
with torch.no_grad():
    torch.save((model(ids).logits, model.merge_and_unload()(ids).logits), sys.argv[3])
assert not any(name.startswith("rotmole") for name in sys.modules)
"""


def elsewhere(model: Path, adapter: Path, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a folder's logits, as it is and merged, by a process that cannot import rotmole.

    They are computed in float64, where only the rounding of the stored B shows.
    """
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(model), str(adapter), str(file)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return torch.load(file)


@pytest.mark.slow
def test_a_lora_is_exported_exactly_and_loads_where_rotmole_is_not(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lone"
    model = save_adapter(place, folder, num_experts=1, rotation="none", r=5)
    assert main(["export", str(folder), "--lora", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "computes the same" in printed
    assert "exact" in printed
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 5
    plain, merged = elsewhere(place / "model", tmp_path / "out", tmp_path / "logits.pt")
    with torch.no_grad():
        expected = model.double()(torch.arange(24).reshape(2, 12)).logits
    near = 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(plain, expected, rtol=0, atol=near)
    torch.testing.assert_close(merged, expected, rtol=0, atol=near)


def test_a_mixture_becomes_the_nearest_lora_with_its_figures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["export", str(run), "--lora", "--rank", "3", "--output", str(out), "--max-kl", "9"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    figures = json.loads((out / "export.json").read_text(encoding="utf-8"))
    for part in ("training rows", "text", "held-out rows", "other text"):
        assert part in printed
        share = figures["shares"][part]
        assert share["static"] <= share["linear"] + 1e-6 or part in ("held-out rows", "other text")
    for part in ("held-out rows", "other text"):
        near, far = figures["agreement"][part], figures["agreement_of_the_base"][part]
        assert near["kl"] < far["kl"]
    assert list(figures["tasks"]["systems"]) == ["mixture", "static"]
    assert (
        figures["tasks"]["systems"]["static"]["tasks"]["film"]["metrics"]["exact_match"]["n"] == 40
    )
    assert len(figures["layers"]) == 4
    tensors = load_file(out / "adapter_model.safetensors")
    assert {
        tensor.shape[i] for name, tensor in tensors.items() for i in (0,) if "lora_A" in name
    } == {3}
    card = ModelCard.load(out / "README.md")
    assert "import rotmole" not in card.text
    assert f"{figures['agreement']['other text']['kl']:.4f}" in card.text
    assert str(tmp_path) not in card.text
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_figures_are_those_of_the_files(run: Path, place: Path, tmp_path: Path) -> None:
    """The divergence on other text, again, from the folders alone."""
    from transformers import AutoTokenizer

    from rotmole.export.text import divided, general_passages, tokenised

    out = tmp_path / "out"
    assert main(["export", str(run), "--lora", "--output", str(out), "--force"]) == 0
    figures = json.loads((out / "export.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    models = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "model"), folder)
        for folder in (run / "adapter", out)
    ]
    total, count = 0.0, 0
    for ids in tokenised(divided(general_passages())[1], tokenizer):
        with torch.no_grad():
            p, q = (model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for model in models)
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    found = figures["agreement"]["other text"]
    assert found["tokens"] == count
    assert found["kl"] == pytest.approx(total / count, rel=1e-3)


def test_what_loses_too_much_is_refused_unless_forced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["export", str(run), "--lora", "--rank", "1", "--output", str(out), "--max-kl", "1e-6"]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "KL" in said.out
    assert "more than --max-kl 1e-06" in said.err
    assert not out.exists()
    assert main([*words, "--force"]) == 0
    assert (out / "adapter_model.safetensors").is_file()
    assert main([*words, "--force"]) == 4  # nothing is written over
    assert "no empty folder" in capsys.readouterr().err


def test_whole_trained_modules_come_along(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lone"
    save_adapter(place, folder, num_experts=1, rotation="none", modules_to_save=["lm_head"])
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if "lm_head" in name)
    save_file(weights | {name: weights[name] + 1}, folder / "adapter_model.safetensors")
    assert main(["export", str(folder), "--lora", "--output", str(tmp_path / "out")]) == 0
    logits = []
    for adapter in (folder, tmp_path / "out"):
        base = AutoModelForCausalLM.from_pretrained(place / "model")
        with torch.no_grad():
            ids = torch.arange(24).reshape(2, 12)
            logits.append(PeftModel.from_pretrained(base, adapter).double()(ids).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--merged"], "differs from token to token"),
        (["--lora"], "add --output DIR"),
        (["--lora", "--onnx", "--output", "x"], "once for each"),
        (["--lora", "--card", "--output", "x"], "--card has no effect"),
        (["--card", "--output", "x"], "has no effect without"),
        (["--card", "--rank", "4", "--force"], "--rank, --force has no effect without --lora"),
        (["--card", "--private"], "--private has no effect"),
        ([], "nothing to do"),
        (["--lora", "--output", "x", "--text", "none.txt"], "none.txt cannot be read"),
    ],
)
def test_options_that_cannot_be(
    run: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), *options]) == 2
    assert words in capsys.readouterr().err


def test_a_mixture_needs_rows(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(place, tmp_path / "lone", num_experts=2)
    words = ["export", str(tmp_path / "lone"), "--lora", "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "add --config RUN.yaml" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text(RUN.format(folder=place), encoding="utf-8")
    assert main([*words, "--data", str(tmp_path / "run.yaml"), "--force", "--limit", "4"]) == 0


@pytest.mark.slow
def test_onnxruntime_computes_the_adapted_model(
    run: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "graph"
    assert main(["export", str(run), "--onnx", "--output", str(out)]) == 0
    assert "differ from torch's" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(place / "model"), run / "adapter"
    )
    for rows, columns in ((1, 5), (4, 21)):
        ids = torch.arange(rows * columns).reshape(rows, columns) % 200
        inputs = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
        with torch.no_grad():
            expected = model(ids).logits
        found = torch.from_numpy(session.run(["logits"], inputs)[0])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (out / "tokenizer_config.json").is_file()
    assert (out / "config.json").is_file()
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "onnx"
    assert str(place) not in card.content


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
def test_a_card_with_scores_is_pushed_once(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["eval", str(run)]) == 0
    capsys.readouterr()
    with fake_hub(monkeypatch) as hub:
        assert main(["export", str(run), "--push", "me/film"]) == 0
        assert "sent: README.md, adapter_config.json" in capsys.readouterr().out
        files = hub.files["me/film"]
        assert (
            files["adapter_model.safetensors"]
            == (run / "adapter" / "adapter_model.safetensors").read_bytes()
        )
        card = files["README.md"].decode()
        scores = json.loads((run / "eval.json").read_text(encoding="utf-8"))
        value = scores["systems"]["after"]["tasks"]["film"]["metrics"]["exact_match"]
        assert f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" in card
        assert "library_name: peft" in card
        assert "import rotmole" in card
        assert str(tmp_path) not in card
        before = hub.sent
        assert main(["export", str(run), "--push", "me/film"]) == 0
        assert "sent:" not in capsys.readouterr().out
        assert hub.sent == before
    texts = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not [path for path in texts if TOKEN.encode() in path.read_bytes()]


def test_nothing_to_export(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(
        RUN.format(folder=place).replace(f"{place}/run", str(tmp_path / "new")), encoding="utf-8"
    )
    assert main(["export", str(tmp_path / "run.yaml"), "--card"]) == 2
    assert "has no adapter yet" in capsys.readouterr().err


def test_another_methods_adapter(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig

    base = AutoModelForCausalLM.from_pretrained(place / "model")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    words = ["export", str(tmp_path / "lora"), "--lora", "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "is a LoRA already: copy that folder" in capsys.readouterr().err
