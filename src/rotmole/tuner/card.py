"""The model card of an adapter: what the hub reads, the import it needs, how it is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

IMPORT = (
    "`import rotmole` registers the method with PEFT (`pip install rotmole`); without it PEFT "
    "cannot read this adapter."
)


def hub_id(name: str | None) -> str | None:
    """Return a model's name if it can be one on the hub, None if it is a path of this machine.

    "owner/name" counts as one on the hub, also if a folder is called so, as PEFT takes it.

    >>> hub_id("org/name"), hub_id("/home/me/llama"), hub_id(None)
    ('org/name', None, None)
    """
    if not name or name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name:
        return None
    is_local = name.count("/") == 0 and os.path.exists(name)
    return None if is_local or name.lower().endswith(".gguf") else name


def shown_name(name: str | None) -> str:
    """Return a model's name without the folders around it, which say nothing to others.

    >>> shown_name("org/name"), shown_name("/home/me/llama")
    ('org/name', 'llama')
    """
    return hub_id(name) or Path(name or "the base model").name


def header(
    base: str | None,
    *,
    datasets: Sequence[str] = (),
    pipeline: str | None = "text-generation",
    tags: Sequence[str] = ("peft", "rotmole"),
) -> str:
    """Write the YAML block that the hub reads; what is not known is left out, such as a licence.

    Args:
        base: name or path of the base model; a path is left out.
        datasets: ids of data sets of the hub.
        pipeline: the hub's name of what the model does.
        tags: of the hub.
    """
    data = ModelCardData(
        base_model=hub_id(base),
        library_name="peft",
        pipeline_tag=pipeline,
        tags=list(tags),
        datasets=list(datasets) or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def loading_code(base: str | None, *, ours: bool = True) -> str:
    """Write the lines of Python that load an adapter onto a causal language model.

    Args:
        base: name or path of the base model; of a path only the folder's name is shown.
        ours: whether the adapter is of this method, which PEFT knows once rotmole is imported.
    """
    where = "" if hub_id(base) else "  # its folder"
    first = "import rotmole\n" if ours else ""
    return f"""{first}from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = "{shown_name(base)}"{where}
adapter = "path/to/this/folder"  # or its hub id
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
"""


def adapter_card(
    base: str | None,
    *,
    code: str | None = None,
    datasets: Sequence[str] = (),
    text: str = "",
    other: str | None = None,
) -> str:
    """Write a whole model card.

    Args:
        base: name or path of the base model; no path of this machine is written.
        code: Python that loads the adapter; None: `loading_code`.
        datasets: ids of data sets of the hub that it was trained on.
        text: Markdown after that, such as the figures of a run.
        other: the peft_type of an adapter of PEFT's own methods; None is this method.
    """
    lines = (code or loading_code(base, ours=other is None)).rstrip()
    about = (
        "A mixture of low-rank experts gated by scaling and rotation."
        if other is None
        else f"An adapter of PEFT's method {other}."
    )
    tags = ("peft", "rotmole" if other is None else other.lower())
    return f"""{header(base, datasets=datasets, tags=tags)}
# {other or "RotMoLE"} adapter for {shown_name(base)}

{about}

```python
{lines}
```
{f"{chr(10)}{IMPORT}" if other is None else ""}
{text}"""
