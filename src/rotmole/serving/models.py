"""The models that a server offers: a base model, and one for each adapter."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rotmole.errors import InputError, ModelError
from rotmole.evaluation.target import Target, find_target, with_adapter
from rotmole.models.endings import end_strings, end_tokens, take_endings
from rotmole.models.limits import window_of
from rotmole.models.load import LoadedModel, load_model
from rotmole.serving.sharing import shared_copy
from rotmole.training.folder.layout import ADAPTER

logger = logging.getLogger(__name__)

UNLIMITED = 1 << 17
"""Tokens of one text if nothing says how many the model can read."""


@dataclass(frozen=True)
class Served:
    """One model that requests name.

    Attributes:
        name: in the requests' ``model``.
        model: with its adapter, in eval mode.
        tokenizer: of the base model.
        date: ISO date that the chat template sees as today's; None is today's.
        adapted: whether an adapter is on the model.
    """

    name: str
    model: Any
    tokenizer: Any
    date: str | None = None
    adapted: bool = True
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def window(self) -> int:
        """The most tokens of one text, prompt and answer together."""
        window = window_of(self.model)
        return UNLIMITED if window is None else window.positions

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer."""
        return end_tokens(self.model, self.tokenizer)

    @property
    def strings(self) -> list[str]:
        """The texts that end an answer."""
        return end_strings(self.model, self.tokenizer)


def named_targets(words: Sequence[str]) -> dict[str, Target]:
    """Return the targets that the words of a command line mean, by the names they are served as.

    Args:
        words: each a path to a run folder, a run file or an adapter folder, or NAME=PATH. Without
            a name it is the name of the run's or the adapter's folder.

    Raises:
        InputError: two have the same name, or a path is no target.
    """
    named: dict[str, Target] = {}
    for word in words:
        name, path = _name_and_path(word)
        target = find_target(path, needs_data=False)
        name = name or _folder_name(target)
        if name in named:
            raise InputError(
                f"{word}: there is a model of the name {name!r} already; give another name, such "
                f"as {name}-2={path}."
            )
        named[name] = target
    return named


def _name_and_path(word: str) -> tuple[str, str]:
    name, equals, path = word.partition("=")
    if not equals or Path(word).expanduser().exists():
        return "", word
    if not name.strip() or not name.isprintable():
        raise InputError(f"{word!r} has no name before the equals sign; write NAME=PATH.")
    return name.strip(), path


def _folder_name(target: Target) -> str:
    place = (target.adapter or target.folder).resolve()
    return place.parent.name if place.name == ADAPTER else place.name


def load_models(
    targets: dict[str, Target],
    *,
    say: Callable[[str], None] = logger.info,
    trust_remote_code: bool = False,
) -> list[Served]:
    """Load the base model once and put each target's adapter on a copy that shares its weights.

    Args:
        targets: from `named_targets`.
        say: called with one line before each slow step.

    Returns:
        The adapted models in the order of the targets, then the base model.

    Raises:
        InputError: the targets have different base models, or the base has an adapter's name.
        ModelError: the base model cannot be loaded, or has no fast tokenizer.
        AdapterError: an adapter is broken or does not fit.
    """
    first = next(iter(targets))
    section = targets[first].model
    for name, target in targets.items():
        _check_same_base(first, targets[first], name, target)
    base_name = _base_name(section.name)
    loaded = load_model(section, trust_remote_code=trust_remote_code, say=say)
    _check_tokenizer(loaded, section.name)
    served = []
    for name, target in targets.items():
        if target.adapter is None:
            continue
        if name == base_name:
            raise InputError(
                f"the adapter {target.adapter} has the name of its base model, {name!r}; write "
                f"NAME={target.adapter}."
            )
        model = with_adapter(shared_copy(loaded.model), target.adapter)
        take_endings(model, target.adapter)
        served.append(Served(name, model.eval(), loaded.tokenizer, target.date))
    loaded.model.eval()
    return [*served, Served(base_name, loaded.model, loaded.tokenizer, adapted=False)]


def _base_name(name: str) -> str:
    """Return the name of a base model in requests: a hub id as it is, the end of a path."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def _check_same_base(first: str, one: Target, name: str, other: Target) -> None:
    if (one.model.name, one.model.revision) != (other.model.name, other.model.revision):
        raise InputError(
            f"{name} has the base model {other.model.name!r}, {first} has {one.model.name!r}; a "
            "server has one base model, so start one server for each."
        )
    if one.model != other.model:
        warnings.warn(
            f"{name} was made with other settings of the base model than {first}; the base is "
            f"loaded with those of {first}.",
            stacklevel=3,
        )


def _check_tokenizer(loaded: LoadedModel, name: str) -> None:
    if not getattr(loaded.tokenizer, "is_fast", False):
        raise ModelError(
            f"model.name {name!r}: its tokenizer is not a fast one, which streaming needs; "
            "choose a model with tokenizer.json."
        )
