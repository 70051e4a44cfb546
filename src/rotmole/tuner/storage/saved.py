"""What PEFT has just saved, made complete: safetensors, readable files, a card that loads."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

from huggingface_hub import ModelCard
from peft.utils import CONFIG_NAME

from rotmole.tuner.card import IMPORT, hub_id, loading_code
from rotmole.tuner.storage.weights import PICKLE, WEIGHTS, replace_pickle

_BASE_TAG = "base_model:adapter:"


def complete_folder(folder: Path, base: str | None) -> None:
    """Do what PEFT's save leaves open, after the last file of an adapter was written.

    With safe_serialization=False PEFT writes adapter_model.bin, which no version of rotmole opens
    (SECURITY.md); it becomes adapter_model.safetensors, and a warning says so. safetensors makes
    files that their owner alone can read; the weights get the permissions of the configuration.

    Args:
        folder: where adapter_config.json was written.
        base: name or path of the base model.
    """
    pickle, weights = folder / PICKLE, folder / WEIGHTS
    if pickle.is_file() and not _is_newer(weights, pickle):
        replace_pickle(folder)
        warnings.warn(
            "safe_serialization=False would save the adapter as a pickle, which can run code "
            f"when it is loaded and which rotmole does not open; it was saved as {WEIGHTS}",
            stacklevel=4,
        )
    if not weights.is_file():
        return  # the configuration alone
    shutil.copymode(folder / CONFIG_NAME, weights)
    for card in (folder / "README.md", folder.parent / "README.md"):  # one above for other names
        if card.is_file() and _is_of_peft(card):
            complete_card(card, base)


def complete_card(file: Path, base: str | None) -> None:
    """Say in PEFT's model card how the adapter is loaded; take paths of this machine out of it."""
    card = ModelCard.load(file, ignore_metadata_errors=True)
    card.data.base_model = hub_id(base)
    tags = [tag for tag in card.data.tags or [] if _is_known_elsewhere(tag)]
    card.data.tags = sorted({*tags, "peft", "rotmole"})
    if "import rotmole" not in card.text:
        card.text = f"```python\n{loading_code(base)}```\n\n{IMPORT}\n\n{card.text.lstrip()}"
    card.save(file)


def _is_newer(weights: Path, pickle: Path) -> bool:
    """Whether weights were saved after a pickle, which then is an old one beside them."""
    return weights.is_file() and weights.stat().st_mtime_ns > pickle.stat().st_mtime_ns


def _is_of_peft(file: Path) -> bool:
    return "library_name: peft" in file.read_text(encoding="utf-8", errors="replace")


def _is_known_elsewhere(tag: str) -> bool:
    return not tag.startswith(_BASE_TAG) or hub_id(tag.removeprefix(_BASE_TAG)) is not None
