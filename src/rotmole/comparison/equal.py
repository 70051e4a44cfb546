"""Equal numbers of trainable parameters: a rank is solved for the whole model, without weights."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from rotmole.config.adapter import adapter_hints, check_adapter
from rotmole.config.peft_types import OURS
from rotmole.config.schema import ModelSection
from rotmole.errors import ConfigError, InputError
from rotmole.models.preview import matched, preview, trainable_by_role
from rotmole.tuner.settings.presets import PRESETS

TOLERANCE = 0.02
"""A method whose parameters differ by more is marked "not equal" and is part of no claim."""
_MOST = 2**20
_LAYER = re.compile(r"(?:^|\.)([^.]+)\.(\d+)\.")


@dataclass(frozen=True)
class Field:
    """How a method's size is set.

    Attributes:
        name: the setting that `parameters` solves.
        alpha: the setting that keeps the scale, alpha / rank; None where it has none.
        divides: whether only divisors of the layers' widths are possible.
        others: settings that have to go with it.
    """

    name: str
    alpha: str | None = None
    divides: bool = False
    others: tuple[tuple[str, Any], ...] = ()


FIELDS: dict[str, Field] = {
    OURS: Field("r", "lora_alpha"),
    "LORA": Field("r", "lora_alpha"),
    "BOFT": Field("boft_block_size", divides=True, others=(("boft_block_num", 0),)),
    "C3A": Field("block_size", divides=True),
    "DEFT": Field("r"),
    "DELORA": Field("r"),
    "FOURIERFT": Field("n_frequency"),
    "GLORA": Field("r"),
    "GRALORA": Field("r", "alpha"),
    "HIRA": Field("r"),
    "HRA": Field("r"),
    "LILY": Field("r"),
    "LOHA": Field("r", "alpha"),
    "LOKR": Field("r", "alpha"),
    "MISS": Field("r"),
    "OFT": Field("oft_block_size", divides=True, others=(("r", 0),)),
    "OSF": Field("effective_rank"),
    "PEANUT": Field("r"),
    "PSOFT": Field("r"),
    "PVERA": Field("r"),
    "RANDLORA": Field("r"),
    "UNILORA": Field("theta_d_length"),
    "VBLORA": Field("num_vectors"),
    "VERA": Field("r"),
    "WAVEFT": Field("n_frequency"),
}
"""The setting that decides how many parameters a method of PEFT trains."""


@dataclass(frozen=True)
class Sized:
    """A method whose size is decided.

    Attributes:
        adapter: its settings, as in a run file.
        field: the setting that was solved; None where nothing was.
        value: of that setting.
        scale: alpha / rank; None where the method has none.
        parameters: trainable, gates included; gates: those of gates alone.
        target: parameters to be equal to; None where nothing is made equal.
        equal: whether it is within TOLERANCE of the target, or has the rank that was asked for.
        rounded: (value, parameters) below and above the target.
        raised: layers that have one more than `value`, because neither rounding is equal.
    """

    adapter: dict[str, Any]
    field: str | None
    value: int | None
    scale: float | None
    parameters: int
    gates: int
    target: int | None
    equal: bool
    rounded: tuple[tuple[int, int], ...] = ()
    raised: int = 0

    @property
    def difference(self) -> float | None:
        """Parameters relative to the target, such as 0.013."""
        return None if self.target is None else self.parameters / self.target - 1


@dataclass(frozen=True)
class Counter:
    """Counts what adapters would train in one base model; nothing is loaded."""

    model: ModelSection
    trust_remote_code: bool = False

    def shape(self, adapter: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the adapted model without weights, and its configuration.

        Raises:
            ConfigError: the settings are wrong, or do not fit the model.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, config, problems = check_adapter(adapter)
            if config is None:
                raise ConfigError(problems)
            try:
                model = preview(
                    self.model, config, torch.float32, trust_remote_code=self.trust_remote_code
                )
            except InputError:
                raise
            except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
                raise ConfigError(f"adapter: {' '.join(str(error).split())}") from error
        return model, config

    def count(self, adapter: Mapping[str, Any]) -> tuple[int, int]:
        """Return trainable parameters, gates included, and those of gates alone."""
        roles = trainable_by_role(self.shape(adapter)[0])
        return sum(roles.values()), roles["scaling_gate"] + roles["rotation_gate"]

    def widths(self, adapter: Mapping[str, Any]) -> int:
        """Return the greatest common divisor of the inputs of all adapted layers."""
        # a plain adapter on the same modules: what is asked for may not fit them yet
        names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        plain = {"peft_type": "LORA", "r": 1} | {k: adapter[k] for k in names if k in adapter}
        layers = matched(self.shape(plain)[0])
        return reduce(math.gcd, (inputs for _, inputs, _ in layers))


def field_of(adapter: Mapping[str, Any]) -> Field | None:
    """Return the setting that decides a method's size; None where there is none."""
    return FIELDS.get(adapter.get("peft_type", OURS))


def with_size(
    adapter: Mapping[str, Any], field: Field, value: int, scale: float | None
) -> dict[str, Any]:
    """Return a method's settings with another rank; alpha follows, so that the scale stays."""
    settings = dict(adapter) | dict(field.others) | {field.name: value}
    if field.alpha and scale is not None and not adapter.get("use_rslora"):
        alpha = scale * value
        settings[field.alpha] = round(alpha) if math.isclose(alpha, round(alpha)) else alpha
    return settings


def scale_of(adapter: Mapping[str, Any], counter: Counter, default: float | None) -> float | None:
    """Return alpha / rank of a method: its own if it writes an alpha, else the study's."""
    field = field_of(adapter)
    if field is None or field.alpha is None:
        return None
    if field.alpha in adapter or default is None:
        config = counter.shape(adapter)[1]
        return float(getattr(config, field.alpha) / getattr(config, field.name))
    return default


def plain_size(adapter: Mapping[str, Any], counter: Counter, scale: float | None) -> Sized:
    """Count a method as it is written."""
    field, scale = field_of(adapter), scale_of(adapter, counter, scale)
    settings = dict(adapter)
    if field is not None:
        value = getattr(counter.shape(adapter)[1], field.name)
        if field.alpha and field.alpha not in adapter:
            settings = with_size(adapter, field, value, scale)
    total, gates = counter.count(settings)
    return Sized(settings, None, None, scale, total, gates, None, equal=False)


def equal_parameters(
    adapter: Mapping[str, Any], counter: Counter, scale: float | None, target: int
) -> Sized:
    """Solve a method's rank for a number of trainable parameters, rounded both ways.

    Raises:
        ConfigError: the method has no setting that decides its size.
    """
    field = field_of(adapter)
    if field is None:
        kind = adapter.get("peft_type", OURS)
        raise ConfigError(
            f"{kind} has no setting that equal: parameters could solve; use equal: none, or one of "
            f"{', '.join(FIELDS)}"
        )
    preset = PRESETS.get(adapter.get("preset", ""))
    if preset is not None and field.name in preset.fields:
        raise ConfigError(
            f"preset {adapter['preset']} fixes {field.name}: {preset.fields[field.name]}, which "
            "equal: parameters would solve; choose its other settings and write equal: none"
        )
    scale = scale_of(adapter, counter, scale)

    def count(value: int) -> int | None:
        try:
            return counter.count(with_size(adapter, field, value, scale))[0]
        except ConfigError:
            return None

    if field.divides:
        width = counter.widths(adapter)
        values = [n for n in range(1, width + 1) if width % n == 0]
        sizes = {n: size for n in values if (size := count(n)) is not None}
    else:
        sizes = _around(count, target)
    if not sizes:  # say why: its own settings are wrong, or no size fits
        counter.count(with_size(adapter, field, 1, scale))
        raise ConfigError(f"no value of {field.name} fits this model")
    below = max((n for n in sizes if sizes[n] <= target), key=lambda n: sizes[n], default=None)
    above = min((n for n in sizes if sizes[n] >= target), key=lambda n: sizes[n], default=None)
    sides = sorted({n for n in (below, above) if n is not None})
    best = min(sides, key=lambda n: abs(sizes[n] - target))
    settings, raised = with_size(adapter, field, best, scale), 0
    if len(sides) == 2 and sides[1] - sides[0] == 1 and not _close(sizes[best], target):
        mixed = _between(adapter, counter, field, sides[0], scale, target)
        nearest = abs(sizes[best] - target)
        if mixed is not None and abs(counter.count(mixed[0])[0] - target) < nearest:
            best, (settings, raised) = sides[0], mixed
    total, gates = counter.count(settings)
    return Sized(
        settings, field.name, best, scale, total, gates, target,
        equal=_close(total, target), rounded=tuple((n, sizes[n]) for n in sides), raised=raised,
    )  # fmt: skip


def _close(count: int, target: int) -> bool:
    return abs(count / target - 1) <= TOLERANCE


def _between(
    adapter: Mapping[str, Any],
    counter: Counter,
    field: Field,
    rank: int,
    scale: float | None,
    target: int,
) -> tuple[dict[str, Any], int] | None:
    """Give some layers, evenly spread, one rank more, until the whole is nearest to the target.

    Returns:
        The settings and how many layers were raised; None for methods without rank_pattern.
    """
    settings = with_size(adapter, field, rank, scale)
    kind = adapter.get("peft_type", OURS)
    patterns = {"rank_pattern", *(["alpha_pattern"] if field.alpha else [])}
    if (
        field.name != "r"
        or not patterns <= adapter_hints(kind).keys()
        or patterns & settings.keys()
    ):
        return None
    paths = counter.shape(settings)[0].base_model.targeted_module_names
    places = [match.groups() for path in paths if (match := _LAYER.search(path))]
    stacks, layers = {name for name, _ in places}, sorted({int(number) for _, number in places})
    if len(stacks) != 1 or len(layers) < 2:
        return None

    def raised(number: int) -> dict[str, Any]:
        chosen = [layers[i * len(layers) // number] for i in range(number)]
        key = rf"{stacks.copy().pop()}\.({'|'.join(map(str, chosen))})\..+"
        mixed = settings | {"rank_pattern": {key: rank + 1}}
        if field.alpha and scale is not None:
            mixed |= {"alpha_pattern": {key: scale * (rank + 1)}}
        return mixed

    low, high = 0, len(layers)  # the count rises with the number of layers
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if counter.count(raised(middle))[0] <= target else (low, middle)
    sizes = {n: counter.count(raised(n))[0] for n in (low, high) if 0 < n < len(layers)}
    if not sizes:
        return None
    best = min(sizes, key=lambda n: abs(sizes[n] - target))
    return raised(best), best


def _around(count: Callable[[int], int | None], target: int) -> dict[int, int]:
    """Search the sizes on both sides of a target; counts rise or fall with the value."""
    sizes: dict[int, int] = {}

    def at(value: int) -> int | None:
        if value not in sizes and (size := count(value)) is not None:
            sizes[value] = size
        return sizes.get(value)

    low, high = _bracket(at, sizes, target)
    while high - low > 1:
        middle = next((n for n in _nearest(low, high) if at(n) is not None), None)
        if middle is None:
            break
        same_side = (sizes[middle] - target) * (sizes[low] - target) > 0
        low, high = (middle, high) if same_side else (low, middle)
    return sizes


def _bracket(
    at: Callable[[int], int | None], found: Mapping[int, int], target: int
) -> tuple[int, int]:
    """Double a value until the target lies between it and the one before, or it fits no more.

    Returns:
        Two values, the first of which fits; (0, 0) if the target is not between any.
    """
    value, last = 1, 0
    while value <= _MOST:
        size = at(value)
        if size is not None and last:
            if (found[last] - target) * (size - target) <= 0:
                return last, value
            if abs(size - target) >= abs(found[last] - target):
                return 0, 0  # the target lies beyond the smallest value, or nothing changes
        if size is None and last and at(value - 1) is None:
            return last, value  # larger ones do not fit the model
        last = value if size is not None else last
        value *= 2
    return 0, 0


def _nearest(low: int, high: int) -> list[int]:
    """Return the values between two others, from the middle outwards, at most nine."""
    middle = (low + high) // 2
    return sorted(range(max(low + 1, middle - 4), min(high, middle + 5)),
                  key=lambda n: (abs(n - middle), n))  # fmt: skip


def active_rank(config: Any) -> int:
    """Return the rank that one token uses: K r, or E r with gates on all experts.

    An expert that is always on counts too.
    """
    experts, chosen = getattr(config, "num_experts", 1), getattr(config, "top_k", None) or 1
    if getattr(config, "selection", "top_k") not in ("top_k", "expert_choice"):
        chosen = experts
    shared = getattr(config, "shared_expert_r", 0) or 0
    return int(chosen * config.r + shared)


def size_in(equal: str, adapter: Mapping[str, Any], counter: Counter) -> int:
    """Return what `equal:` makes alike of a method: parameters, rank or active rank."""
    if equal == "parameters":
        return counter.count(adapter)[0]
    config = counter.shape(adapter)[1]
    return active_rank(config) if equal == "active_rank" else int(config.r)


def equal_rank(
    adapter: Mapping[str, Any], counter: Counter, scale: float | None, rank: int, *, active: bool
) -> Sized:
    """Give a method a rank, or the rank that makes K r equal to a number.

    Raises:
        ConfigError: the method has no rank.
    """
    field = field_of(adapter)
    kind = adapter.get("peft_type", OURS)
    if field is None or field.name != "r":
        raise ConfigError(f"{kind} has no rank, so equal: rank cannot compare it; use parameters")
    scale = scale_of(adapter, counter, scale)
    config = counter.shape(adapter)[1]
    fixed = active_rank(config) if active else config.r
    each = (active_rank(counter.shape(dict(adapter) | {"r": config.r + 1})[1]) - fixed
            if active else 1)  # fmt: skip
    own = (rank - (fixed - each * config.r)) / each if active else rank
    values = sorted({max(math.floor(own), 1), max(math.ceil(own), 1)})
    counts = {n: counter.count(with_size(adapter, field, n, scale))[0] for n in values}
    best = min(values, key=lambda n: abs(n - own))
    settings = with_size(adapter, field, best, scale)
    total, gates = counter.count(settings)
    return Sized(
        settings, "r", best, scale, total, gates, None,
        equal=math.isclose(best, own), rounded=tuple(counts.items()),
    )  # fmt: skip
