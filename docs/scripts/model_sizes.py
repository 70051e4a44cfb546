"""Write the computed tables of docs/scale.md (memory) and docs/guide.md (trainable parameters).

    python docs/scripts/model_sizes.py

Nothing is loaded or measured: models without weights are built from their widths, and the memory is
what `rotmole check` estimates (rotmole.models.memory).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

import rotmole
from rotmole.config.schema import ModelSection
from rotmole.models.builtin import SMOLLM2
from rotmole.models.memory import estimate_memory
from rotmole.models.preview import matched, preview, trainable_by_role

DOCS = Path(__file__).parents[1]

MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "SmolLM2-135M": lambda: LlamaConfig(**SMOLLM2.architecture),
    "Llama-3.2-1B": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
    ),
    "Llama-3.2-3B": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
        num_attention_heads=24, num_key_value_heads=8, tie_word_embeddings=True,
    ),
    "Qwen2.5-3B": lambda: Qwen2Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
        num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Llama-3.1-8B": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    ),
}  # fmt: skip
"""The widths of each model's config.json on the hub."""

TARGETS: dict[str, Any] = {
    "q, k, v, o": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all-linear": "all-linear",
}
LARGE = ("Llama-3.2-3B", "Qwen2.5-3B", "Llama-3.1-8B")
GPUS, ROWS, TOKENS = 8, 4, 1024


def adapted(name: str, targets: str, rotation: str = "tangent") -> Any:
    """Build a model of MODELS without weights, in bfloat16, with the adapter of the templates."""
    config = rotmole.RotMoleConfig(
        task_type="CAUSAL_LM", num_experts=4, top_k=2, r=8, rotation=rotation,
        target_modules=TARGETS[targets],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        MODELS[name]().save_pretrained(folder)
        return preview(ModelSection(name=folder), config, torch.bfloat16)


def memory_row(name: str, targets: str) -> list[str]:
    """Return one line of the table of memory, in GB for each process."""
    model = adapted(name, targets)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in frozen)
    gathered = _gathered(model)
    few = _estimate(model, checkpointing=True)
    many = _estimate(adapted(name, targets), checkpointing=False)
    state = few.adapter + few.optimizer
    sharded = (weights + state) / GPUS + gathered
    sizes = (
        weights, state, few.step, many.step, weights + state + few.step,
        weights + state + many.step, sharded + few.step, few.weights + state + few.step,
    )  # fmt: skip
    return [name, targets, *(f"{size / 1e9:.1f}" for size in sizes)]


def _estimate(model: Any, *, checkpointing: bool) -> Any:
    return estimate_memory(
        model,
        batch=ROWS,
        length=TOKENS,
        settings={"activation_checkpointing": checkpointing},
        process=0,
        quantization="bnb-4bit-nf4",  # changes the weights alone
    )


def _gathered(model: Any) -> int:
    """Return the bytes that FSDP2 gathers at a time: one layer, embeddings and head."""
    base = model.get_base_model()
    outside = {
        id(module.weight): module.weight
        for module in (base.get_input_embeddings(), base.get_output_embeddings())
    }
    parts = [*base.model.layers[0].parameters(), *outside.values()]
    return sum(p.numel() * p.element_size() for p in parts)


def memory_table(rows: Sequence[Sequence[str]]) -> str:
    """Return the table of docs/scale.md."""
    head = (
        "model", "adapted", "W", "A + AdamW", "update, checkpointing", "update, without",
        f"DDP, each of {GPUS}, checkpointing", "DDP, without", f"FSDP2, each of {GPUS}, at most",
        "one GPU, W in 4 bits",
    )  # fmt: skip
    return _table([head, ["---"] * len(head), *rows])


def size_rows() -> Iterator[list[str]]:
    """Yield a line for each model and choice of modules: parameters, and LoRA's equal rank."""
    for name in MODELS:
        for targets in TARGETS:
            line = [name, targets]
            for rotation in ("none", "tangent"):
                model = adapted(name, targets, rotation)
                trained = sum(trainable_by_role(model).values())
                per_rank = sum((i + o) * count for (_, i, o), count in matched(model).items())
                line += [f"{trained / 1e6:.1f} M", str(round(trained / per_rank))]
            yield line


def size_table() -> str:
    """Return the table of docs/guide.md."""
    head = [
        "model", "adapted", "MoE-LoRA (none)", "LoRA of as many: r", "tangent",
        "LoRA of as many: r",
    ]  # fmt: skip
    return _table([head, ["---"] * len(head), *size_rows()])


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_table(page: str, name: str, table: str) -> str:
    """Return a page with a table between <!-- NAME --> and <!-- end of NAME -->."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = page.partition(start)
    _, found, after = rest.partition(end)
    assert found, f"the page has no {start} ... {end}"
    return f"{before}{start}\n{table}\n{end}{after}"


def main() -> None:
    """Write both tables."""
    memory = memory_table([memory_row(name, targets) for name in LARGE for targets in TARGETS])
    for file, name, table in (
        ("scale.md", "memory", memory),
        ("guide.md", "sizes", size_table()),
    ):
        page = (DOCS / file).read_text(encoding="utf-8")
        (DOCS / file).write_text(with_table(page, name, table), encoding="utf-8")


if __name__ == "__main__":
    main()
