"""``rotmole grow``: a trained mixture gets further experts; its outputs stay what they were."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rotmole.cli.screen import fact
from rotmole.config.load import resolved_yaml
from rotmole.errors import AdapterError, InputError
from rotmole.evaluation.target import Target, find_target
from rotmole.files import atomic_write_text, whole_folder
from rotmole.models.adapter import check_adapter_folder
from rotmole.training.folder.layout import ADAPTER
from rotmole.tuner.grow import grow_saved
from rotmole.tuner.settings.settings import PARTS

RUN = "run.yaml"


def grow(
    target: Path,
    experts: int,
    output: Path,
    *,
    freeze_old: Sequence[str] = (),
    keep_all: bool = False,
    seed: int = 0,
) -> int:
    """Write OUTPUT/adapter, and for a run OUTPUT/run.yaml, by which it is trained on.

    Args:
        target: a run folder, a run file or an adapter folder.
        experts: how many each layer gets.
        output: a new folder; it appears complete or not at all.
        freeze_old: of "experts", "router", "shared_expert".
        keep_all: freeze all of these that there are.
        seed: of the new experts' initial weights.

    Raises:
        InputError: no such target, or the folder exists.
        AdapterError: there is no adapter, or it is no mixture of rotmole's.
        ConfigError: the mixture cannot grow.
        StorageError: the disk refused.
    """
    place = find_target(target, needs_data=False)
    adapter, saved = _mixture(place, target)
    if keep_all:
        parts = [part for part in PARTS if part != "shared_expert" or saved.get("shared_expert_r")]
        freeze_old = [*freeze_old, *parts]
    output = output.expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output} exists and is not empty; choose another folder.")
    with whole_folder(output) as fresh:
        config = grow_saved(adapter, fresh / ADAPTER, experts, freeze_old=freeze_old, seed=seed)
        if place.run is not None:
            changed = {
                "adapter": {},
                "init_from": str(output.absolute()),
                "output_dir": str(output.absolute() / "trained"),
            }
            text = resolved_yaml(place.run.model_copy(update=changed))
            atomic_write_text(fresh / RUN, text)
    fact("experts", f"{config.num_experts - experts} + {experts} in each layer")
    fact("frozen", ", ".join(config.freeze_old) or "nothing of what was there")
    fact("adapter", str(output / ADAPTER))
    if place.run is None:
        fact("train it", f"rotmole train RUN.yaml init_from={shlex.quote(str(output))}")
    else:
        fact("run file", f"{output / RUN}; its data are those of {target}, write the new ones")
        fact("train it", f"rotmole train {shlex.quote(str(output / RUN))}")
    return 0


def _mixture(place: Target, target: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the settings of a target's mixture, the only adapter that can grow."""
    if place.adapter is None:
        raise AdapterError(f"{target} has no adapter yet, so nothing can grow; train it first.")
    saved = check_adapter_folder(place.adapter)
    if saved.get("peft_type") != "ROTMOLE":
        raise AdapterError(
            f"{place.adapter} is a {saved.get('peft_type')} adapter; rotmole grow takes RotMoLE's. "
            "RotMoleModel.from_adapters makes a mixture of LoRA adapters."
        )
    return place.adapter, saved
