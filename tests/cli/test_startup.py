"""Help, version and init answer at once: nothing heavy is imported for them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from tiny_folders import write_base_model, write_rows

COMMANDS = {
    "help": ["--help"],
    "version": ["--version"],
    "verb help": ["train", "--help"],
    "init": ["init", "run.yaml"],
    "mistake": ["tarin"],
}
HEAVY = ["torch", "peft", "transformers", "trl", "datasets", "numpy", "rotmole"]


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_nothing_heavy_is_imported(words, tmp_path):
    code = f"""
import sys
from rotmole_cli import main
code = main({words!r})
assert code == {2 if words == ["tarin"] else 0}, code
print("HEAVY", sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_the_hubs_telemetry_is_off(tmp_path):
    """Of the hub's client as it is imported, whatever the environment forgot to say."""
    code = """
from rotmole_cli import main
main(["init", "run.yaml"])
from huggingface_hub import constants
print("TELEMETRY OFF", constants.HF_HUB_DISABLE_TELEMETRY)
"""
    names = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE")
    env = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=tmp_path, env=env, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "TELEMETRY OFF True"


RUN = """\
output_dir: {folder}
model: {{name: {folder}/model, dtype: float32, device: cpu}}
data:
  tasks:
    film: {{source: jsonl, files: {{validation: {folder}/film.jsonl}}}}
training: {{max_steps: 3, max_length: 64}}
evaluation: {{max_new_tokens: 2}}
"""
NOT_NEEDED = ["trl", "datasets", "matplotlib", "pyarrow", "sklearn", "transformers.trainer",
              "rotmole.training.build", "rotmole.serving", "rotmole.inspection"]  # fmt: skip


@pytest.mark.slow
def test_using_a_run_imports_nothing_of_training(tmp_path):
    """trl, datasets and the Trainer take seconds, and a finished run was checked by them before."""
    write_base_model(tmp_path / "model")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    rows = [{"prompt": f"film {i} is", "completion": " good"} for i in range(3)]
    write_rows(tmp_path / "film.jsonl", rows)
    (tmp_path / "run.yaml").write_text(RUN.format(folder=tmp_path), encoding="utf-8")
    (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")
    code = f"""
import sys
from rotmole_cli import main
for words in (["generate", {str(tmp_path)!r}, "film", "--max-new-tokens", "2"],
              ["eval", {str(tmp_path)!r}]):
    assert main(words) == 0, words
    print(words[0], sorted(set({NOT_NEEDED!r}) & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.endswith("]")]
    assert [line for line in told if line[:4] in ("gene", "eval")] == ["generate []", "eval []"]
