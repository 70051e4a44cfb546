"""The study file: one YAML file describes which methods are compared, on what, and how."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from rotmole.comparison.results import NLL
from rotmole.config.schema import Section, Split
from rotmole.tuner.settings.presets import FREE

COMMON = tuple(sorted(FREE - {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}))
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def _preset(value: object) -> object:
    return {"adapter": {"preset": value}} if isinstance(value, str) else value


def _names(methods: dict[str, Any]) -> dict[str, Any]:
    wrong = [name for name in methods if not _NAME.fullmatch(name)]
    if wrong:
        names = ", ".join(map(repr, wrong))
        raise ValueError(f"named by letters, digits and . _ + - alone, as folders are: {names}")
    return methods


def _distinct(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("a list of seeds that differ")
    return seeds


Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], AfterValidator(_distinct)]


class MethodSection(Section):
    """One method: its adapter, and what else it needs."""

    adapter: dict[str, Any] = Field(
        description="Settings of the adapter; they replace base's, but for those in `common`.",
        examples=[{"preset": "moe_lora"}],
    )
    training: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of base's `training:` that this method replaces.",
        examples=[{"weight_decay": 0.01}],
    )
    optimizer: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of base's `optimizer:` that this method replaces.",
        examples=[{"lora_plus_ratio": 4.0}],
    )


class TuneSection(Section):
    """The grid from which each method gets its own best settings."""

    grid: dict[str, Annotated[list[float], Field(min_length=1)]] = Field(
        min_length=1,
        description="Full name of a setting, or `scale`, -> its values; the same for all methods. "
        "All combinations are tried.",
        examples=[{"training.learning_rate": [1e-3, 2e-3, 4e-3]}],
    )
    seeds: Seeds = Field(
        min_length=1,
        description="Seeds of tuning, none of which may be a final seed.",
        examples=[[100, 101]],
    )
    growth: int = Field(
        default=2,
        ge=0,
        description="How many values may be added to the grid, for all methods, while the best of "
        "any method lies on its edge.",
        examples=[0],
    )


class StudyFile(Section):
    """A comparison of methods."""

    output_dir: Annotated[str, AfterValidator(os.path.expanduser)] = Field(
        min_length=1, description="Folder of the study.", examples=["runs/study"]
    )
    base: dict[str, Any] = Field(
        description="The run file that all cells share: its path, or its content.",
        examples=["run.yaml"],
    )
    methods: Annotated[
        dict[str, Annotated[MethodSection, BeforeValidator(_preset)]], AfterValidator(_names)
    ] = Field(
        min_length=2,
        description="Name -> the method, or the name of a preset.",
        examples=[{"lora": {"adapter": {"peft_type": "LORA", "r": 24}}, "moe": "moe_lora"}],
    )
    baseline: str = Field(
        description="The method that the others are compared with.", examples=["lora"]
    )
    common: list[str] = Field(
        default=list(COMMON),
        description="Settings of base's `adapter:` that every method takes, if it knows them.",
        examples=[["target_modules", "lora_dropout"]],
    )
    equal: Literal["parameters", "rank", "active_rank", "none"] = Field(
        default="parameters",
        description="What is made equal to the baseline's: trainable parameters of the whole "
        "model, gates included; the rank; the rank that a token uses (K r); or nothing.",
        examples=["rank"],
    )
    parameters: int | None = Field(
        default=None,
        gt=0,
        description="Trainable parameters that all methods get, the baseline too (equal: "
        "parameters); null: as many as the baseline has.",
        examples=[3000000],
    )
    scale: float | None = Field(
        default=None,
        gt=0,
        description="s = alpha / r of every method that does not write its own alpha; null: that "
        "of base's adapter section.",
        examples=[2.0],
    )
    tune: TuneSection | None = Field(
        default=None, description="Tuning before the final seeds; null: rates are as written."
    )
    seeds: Seeds = Field(
        description="Seeds of the final cells. None, [], makes a screen: methods are tuned, and "
        "compared by the validation loss of their best settings, without claims.",
        examples=[[0, 1, 2, 3, 4]],
    )
    metrics: list[str] = Field(
        default=[NLL],
        min_length=1,
        description="What is judged, the first one before all: nll is the negative log-likelihood "
        "of the answer; others count in the tasks that have them.",
        examples=[["nll", "exact_match"]],
    )
    split: Split = Field(
        default="test", description="Split that the final cells are scored on, once.",
        examples=["validation"],
    )  # fmt: skip
    held_out: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Tasks that no cell trains on, as under `data.tasks`. The final cells are "
        "scored on them too, as a measure of its own that is part of no claim.",
        examples=[{"dutch": {"source": "locale", "kind": "dates", "languages": ["nl"]}}],
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of each process; null: the cores divided by --jobs. Fixed when "
        "the study starts.",
        examples=[1],
    )

    @property
    def first_seed(self) -> int:
        """A seed whose rows stand for all."""
        return [*self.seeds, *(self.tune.seeds if self.tune else [])][0]
