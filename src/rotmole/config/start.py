"""`init_from:`: the adapter whose settings and weights a run starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rotmole.config.adapter import REFUSED, adapter_hints
from rotmole.errors import RotMoleError

ADAPTER, CONFIG = "adapter", "adapter_config.json"
FREE = (
    "lora_dropout", "router_jitter", "router_aux_loss_coef", "router_aux_loss_scope",
    "router_z_loss_coef", "router_task_loss_coef", "router_task_offset", "router_task_groups",
    "router_sqrt_gate", "frozen", "freeze_old", "dispatch", "compute_dtype", "kernels",
)  # fmt: skip
"""Settings that a run may choose anew: they change no tensor and no output of the adapter."""


def start_folder(init_from: str) -> Path:
    """Return the adapter's folder: the one that is named, or that of the run folder."""
    folder = Path(init_from).expanduser()
    return folder / ADAPTER if (folder / ADAPTER / CONFIG).is_file() else folder


def settings_from(init_from: str, section: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the adapter's settings as saved, with those of the run file that may differ.

    Args:
        init_from: an adapter folder or a run folder.
        section: `adapter:` of the run file. If the folder is gone, as may be for a run that has
            started, a section with num_experts, such as a run folder's own, stands for itself.

    Returns:
        The settings, and one sentence for each problem.
    """
    from rotmole.tuner.config import RotMoleConfig

    folder = start_folder(init_from)
    if not (folder / CONFIG).is_file():
        if "num_experts" in section:
            return dict(section), []
        return dict(section), [
            f"init_from is {init_from!r}, which holds no adapter ({CONFIG} is missing); name an "
            "adapter folder or the folder of a finished run"
        ]
    try:
        saved = RotMoleConfig.from_pretrained(str(folder))
    except (RotMoleError, ValueError, TypeError) as error:
        return dict(section), [f"init_from is {init_from!r}: {' '.join(str(error).split())}"]
    names = adapter_hints().keys() - REFUSED.keys() - {"preset"}
    default = RotMoleConfig()
    values = {name: _plain(getattr(saved, name)) for name in sorted(names)}
    settings = {
        name: value
        for name, value in values.items()
        if value != _plain(getattr(default, name)) or name in ("num_experts", "top_k")
    }
    problems = [
        f"adapter.{name} is {value!r}, but the adapter of init_from has {values.get(name)!r}; "
        f"leave it out (a run may choose anew {', '.join(FREE)})"
        for name, value in section.items()
        if name not in FREE and (name not in values or _plain(value) != values[name])
    ]
    return settings | {name: value for name, value in section.items() if name in FREE}, problems


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) or _is_words(value) else value


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)
