"""The run file: one YAML file describes one run from data to adapter.

Keys under `adapter:` are RotMoleConfig names verbatim, keys under `training:` are TRL SFTConfig
names verbatim; both are checked against those classes in `load.py`, so nothing is learnt twice.
This module imports neither torch nor peft.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr

from rotmole.errors import ConfigError

if TYPE_CHECKING:
    from rotmole.tuner.config import RotMoleConfig

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

METRICS = (
    "exact_match", "choice_accuracy", "choice_accuracy_norm", "accuracy", "macro_f1", "matthews",
    "pearson", "spearman", "rouge_l", "chrf", "perplexity",
)  # fmt: skip


class Section(BaseModel):
    """Base of every section: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class ModelSection(Section):
    """Which base model to adapt, and how to load it."""

    name: str = Field(
        default="smollm2-135m",
        min_length=1,
        description="built-in name (smollm2-135m), hub id, local folder, or a .gguf file",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="auto: bfloat16 where a short probe finds it faster, else float32",
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    attn_implementation: str | None = None
    revision: str | None = None
    device_map: str | dict[str, Any] | None = None
    quantization: Literal["none", "bnb-8bit", "bnb-4bit-nf4", "torchao-int8"] = Field(
        default="none",
        description="quantise the base while loading; the adapter stays in full precision",
    )


class TaskSection(Section):
    """One named task: where its rows come from and how a row becomes prompt and completion."""

    source: Literal["jsonl", "csv", "parquet", "hub", "locale"]
    files: dict[Split, str | list[str]] = Field(
        default_factory=dict, description="files of each split (jsonl, csv, parquet)"
    )
    dataset: str | None = Field(default=None, description="datasets-hub id (source: hub)")
    dataset_config: str | None = None
    splits: dict[Split, str] = Field(
        default_factory=dict, description="our split -> the hub's split name"
    )
    validation_fraction: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="carve this share of train into validation, by row hash",
    )
    format: Literal[
        "prompt_completion", "messages", "text", "multiple_choice", "classification", "regression"
    ] = "prompt_completion"
    prompt: str = Field(
        default="{prompt}", description="template; {column} is replaced by the row's value"
    )
    completion: str = Field(default="{completion}", description="template of the answer")
    messages_column: str = "messages"
    text_column: str = "text"
    choices_column: str = "choices"
    answer_column: str = Field(default="answer", description="index of the right choice")
    label_column: str = "label"
    labels: list[str] | None = Field(
        default=None, description="label words by label index (classification); 0..5 for regression"
    )
    score_column: str = "score"
    group_column: str | None = Field(
        default=None, description="column that splits the report, such as a language"
    )
    kind: str | None = Field(default=None, description="which locale task (source: locale)")
    languages: list[str] | None = Field(
        default=None, description="which languages (source: locale)"
    )
    loss_on: Literal["completion", "all"] = "completion"
    weight: float | None = Field(
        default=None, gt=0, description="relative sampling weight of the task"
    )
    limit: dict[Split, int] = Field(
        default_factory=dict,
        description="at most this many rows per group (locale: per language), seeded choice",
    )
    task_group: int | None = Field(
        default=None,
        ge=0,
        description="which group of experts adapter.router_task_loss_coef favours for this task; "
        "None: tasks take the groups in turn",
    )
    long_rows: Literal["error", "cut"] = Field(
        default="error",
        description="a row longer than max_length: error, or cut the start of its prompt",
    )
    metrics: list[str] | None = Field(default=None, description=f"any of {', '.join(METRICS)}")


class DataSection(Section):
    """The mixture of named tasks."""

    root: str = Field(default=".", description="folder that relative names in `files` start from")
    tasks: dict[str, TaskSection] = Field(min_length=1)
    temperature: float | None = Field(
        default=None,
        gt=0,
        description="task share ~ rows^(1/temperature); 1 keeps sizes, large is uniform; None uses "
        "each row once (or the weights)",
    )


class OptimizerSection(Section):
    """The optimiser's metric, and learning rates by role; None follows training.learning_rate."""

    name: Literal["riemannian_adamw", "riemannian_sgd"] | None = Field(
        default=None,
        description="precondition the experts' gradients; None: training.optim decides",
    )
    riemannian_delta: float | None = Field(
        default=None, gt=0, description="d of (B B^T + d I)^-1; None is 1e-6"
    )
    scaling_gate_lr: float | None = Field(default=None, ge=0)
    rotation_gate_lr: float | None = Field(default=None, ge=0)
    lora_plus_ratio: float | None = Field(
        default=None, gt=0, description="lr of B over lr of A (LoRA+)"
    )


class EvaluationSection(Section):
    """What `rotmole eval` does after or without training."""

    split: Split = "validation"
    limit: int | None = Field(default=None, gt=0, description="rows per task and group")
    max_new_tokens: int = Field(default=64, gt=0)
    batch_size: int = Field(default=16, gt=0)
    examples_in_prompt: int = Field(
        default=0, ge=0, description="worked examples from train in the prompt"
    )
    before: bool = Field(default=True, description="also score with the adapter disabled")


class RunFile(Section):
    """One run."""

    output_dir: Annotated[str, AfterValidator(os.path.expanduser)] = Field(
        min_length=1, description="the run folder"
    )
    seed: int = Field(default=0, ge=0, lt=2**32)  # NumPy's limit
    model: ModelSection = Field(default_factory=ModelSection)
    adapter: dict[str, Any] = Field(default_factory=dict)
    data: DataSection
    training: dict[str, Any] = Field(default_factory=dict)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    _adapter_config: Any = PrivateAttr(default=None)
    _config_settings: dict[str, Any] = PrivateAttr(default_factory=dict)

    def set_adapter(self, settings: dict[str, Any], config: RotMoleConfig) -> None:
        """Set the `adapter:` section and the configuration that was made of it."""
        self.adapter = settings
        self._config_settings, self._adapter_config = settings, config

    @property
    def adapter_config(self) -> RotMoleConfig:
        """The adapter's configuration as it was checked; copy it before PEFT changes it.

        Raises:
            ConfigError: `load_run` did not check this run, or its adapter section changed since.
        """
        if self._adapter_config is None or self._config_settings != self.adapter:
            raise ConfigError("the adapter section was not checked; read the run with load_run")
        config: RotMoleConfig = self._adapter_config
        return config
