"""What the processes of tests/cli/test_preset_runs.py do, each a fork of an idle interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

IDS = [[5, 9, 11, 40, 17, 8, 60], [30, 31, 7, 7, 12, 90, 3]]


def _logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(IDS)).logits


def trained(words: list[str], out: str) -> int:
    """Run `rotmole train` and keep the logits of the model that it trained, and where it began."""
    import torch

    from rotmole.training import run
    from rotmole_cli import main

    work, kept = run.train, {}

    def watched(*args: Any, prepare: Any, **kwargs: Any) -> Any:
        def begin(built: Any) -> None:
            prepare(built)
            named = built.model.named_parameters()
            kept["start"] = {n: p.detach().clone() for n, p in named if p.requires_grad}

        result = work(*args, prepare=begin, **kwargs)
        kept["end"] = {n: p.detach() for n, p in result.built.model.named_parameters()}
        kept["logits"] = _logits(result.built.model)
        return result

    run.train = watched
    code = main(words)
    torch.save(kept, out)
    return code


def loaded(base: str, adapter: str, out: str) -> int:
    """Load an adapter as README.md shows it, and keep the model's logits."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import rotmole  # noqa: F401 - adds the method to PEFT

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    without = _logits(plain)
    torch.save([_logits(PeftModel.from_pretrained(plain, Path(adapter))), without], out)
    return 0
