"""Write folders with the widths of the published models and a tokenizer, but no weights.

    python experiments/published/widths.py FOLDER [--tokenizer MODEL]
    rotmole check experiments/published/riemannian.yaml data.root=DATA \\
        model.name=FOLDER/Llama-3.2-3B

`rotmole check` then counts parameters, operations and memory on any machine, and finds every
mistake of the study file. Its tokenizer is a small one, which needs more tokens for a text than the
real one does; --tokenizer takes that of another model, such as smollm2-135m.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rotmole.config.schema import ModelSection
from rotmole.models.load import load_tokenizer

ROOT = Path(__file__).parents[2]
STUDIES = {"riemannian": "Llama-3.2-3B", "small_experts": "Qwen2.5-3B"}
"""Study file -> the model whose widths it is checked with."""
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def write_folders(folder: Path, tokenizer: Any) -> dict[str, Path]:
    """Write a folder for each model, and return study -> folder."""
    written = {}
    for study, name in STUDIES.items():
        config = _model_sizes().MODELS[name]()
        config.architectures = [ARCHITECTURES[config.model_type]]
        config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
        written[study] = folder / name
        config.save_pretrained(written[study])
        tokenizer.save_pretrained(written[study])
    return written


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer of 2000 pairs on this project's own documents."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    pages = sorted((ROOT / "docs").glob("*.md"))
    core.train_from_iterator((page.read_text(encoding="utf-8") for page in pages), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def _model_sizes() -> ModuleType:
    """Load the script that knows the widths of config.json of published models."""
    file = ROOT / "docs" / "scripts" / "model_sizes.py"
    spec = importlib.util.spec_from_file_location("model_sizes", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", help="of this model in place of a small one")
    given = parser.parse_args()
    name = given.tokenizer
    words = load_tokenizer(ModelSection(name=name)) if name else small_tokenizer()
    for path in write_folders(given.folder, words).values():
        print(f"written: {path}")
