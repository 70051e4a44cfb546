"""The run file: one YAML file describes one run from data to adapter.

Keys under `adapter:` are names of RotMoleConfig, or of the configuration of another method of
PEFT that adapter.peft_type names; keys under `training:` are names of TRL's
SFTConfig; `load.py` checks both against those classes. This module imports neither torch nor peft.
docs/reference.md is generated from the descriptions and examples here.
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from rotmole.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

METRICS = (
    "exact_match", "choice_accuracy", "choice_accuracy_norm", "accuracy", "macro_f1", "matthews",
    "pearson", "spearman", "rouge_l", "greedy_match", "chrf", "perplexity",
)  # fmt: skip


class Section(BaseModel):
    """Base of every section: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class ModelSection(Section):
    """Which base model to adapt, and how to load it."""

    name: str = Field(
        default="smollm2-135m",
        min_length=1,
        description="Built-in name (smollm2-135m), hub id, local folder, or a .gguf file.",
        examples=["models/llama"],
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number format of the base model's weights; auto takes bfloat16 if a short "
        "measurement on the device finds it faster, else float32.",
        examples=["bfloat16"],
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = Field(
        default="auto", description="Device; auto takes a GPU if there is one.", examples=["cpu"]
    )
    attn_implementation: str | None = Field(
        default=None,
        description="attn_implementation of transformers' from_pretrained; null leaves the choice "
        "to transformers.",
        examples=["sdpa"],
    )
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of the model on the hub; null is its main branch.",
        examples=["v1.0"],
    )
    device_map: str | dict[str, Any] | None = Field(
        default=None,
        description="device_map of transformers' from_pretrained; null means `device`.",
        examples=["auto"],
    )
    quantization: Literal["none", "bnb-8bit", "bnb-4bit-nf4", "torchao-int8"] = Field(
        default="none",
        description="Quantise the base model while it is loaded; the adapter is not quantised.",
        examples=["bnb-4bit-nf4"],
    )


def _delimiter(value: object) -> object:
    value = {"tab": "\t", "\\t": "\t"}.get(value, value) if isinstance(value, str) else value
    if isinstance(value, str) and (len(value) != 1 or value in '"\r\n'):
        raise ValueError("one character, such as ; or tab")
    return value


class TaskSection(Section):
    """One task: the source of its rows, and how a row becomes a prompt and a completion."""

    source: Literal["files", "jsonl", "json", "csv", "parquet", "arrow", "hub", "locale"] = Field(
        default="files",
        description="Type of the files; files: by the ending of each name (.jsonl, .ndjson, .json, "
        ".csv, .tsv, .parquet, .arrow, also compressed, such as .jsonl.gz); hub: a dataset of the "
        "hub; locale: generated from the locale data of Babel and num2words.",
        examples=["jsonl"],
    )
    files: dict[Split, str | list[str]] | str | list[str] = Field(
        default_factory=dict,
        description="Files of each split: names, folders, or patterns such as data/*.jsonl. A "
        "single folder alone: the names in it say the split (train, validation, test).",
        examples=[{"train": "train.jsonl"}],
    )
    delimiter: Annotated[str | None, BeforeValidator(_delimiter)] = Field(
        default=None,
        description="Character between the values of csv files; null finds comma, semicolon, tab "
        "or bar; `tab` is the tab.",
        examples=[";"],
    )
    dataset: str | None = Field(
        default=None, description="Dataset id (source hub).", examples=["org/name"]
    )
    dataset_config: str | None = Field(
        default=None, description="Configuration of the dataset (source hub).", examples=["main"]
    )
    splits: dict[Split, str] = Field(
        default_factory=dict,
        description="Split -> the dataset's name of that split (source hub).",
        examples=[{"validation": "dev"}],
    )
    validation_fraction: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Share of the train rows that is used for validation instead, chosen by a hash "
        "of each row.",
        examples=[0.1],
    )
    format: Literal[
        "prompt_completion", "messages", "text", "multiple_choice", "classification", "regression"
    ] = Field(
        default="prompt_completion",
        description="How a row becomes a prompt and a completion.",
        examples=["messages"],
    )
    prompt: str = Field(
        default="{prompt}",
        description="Template of the prompt; {column} is replaced by the row's value.",
        examples=["Question: {question}"],
    )
    completion: str = Field(
        default="{completion}", description="Template of the answer.", examples=["{answer}"]
    )
    messages_column: str = Field(
        default="messages",
        description="Column of the list of messages (format messages); if there is no column "
        "messages, it is conversations.",
        examples=["conversation"],
    )
    text_column: str = Field(
        default="text", description="Column of the text (format text).", examples=["document"]
    )
    choices_column: str = Field(
        default="choices",
        description="Column of the list of answers (format multiple_choice).",
        examples=["options"],
    )
    answer_column: str = Field(
        default="answer",
        description="Column of the right answer: its index from 0, letter or text (format "
        "multiple_choice).",
        examples=["gold"],
    )
    label_column: str = Field(
        default="label", description="Column of the label (format classification).", examples=["y"]
    )
    labels: list[str] | None = Field(
        default=None,
        description="Label words by label index (format classification); a row gives the word or "
        "the index. null with format regression: 0 to 5.",
        examples=[["negative", "positive"]],
    )
    score_column: str = Field(
        default="score",
        description="Column of the number (format regression).",
        examples=["rating"],
    )
    group_column: str | None = Field(
        default=None,
        description="Column whose values divide the report into groups, such as a language.",
        examples=["language"],
    )
    kind: str | None = Field(
        default=None, description="Which locale task (source locale).", examples=["dates"]
    )
    languages: list[str] | None = Field(
        default=None, description="Languages (source locale).", examples=[["de", "fr"]]
    )
    loss_on: Literal["completion", "last", "all"] = Field(
        default="completion",
        description="Tokens that count in the loss: the completion's (format messages: every "
        "answer of the assistant), the last answer's alone (format messages), or all.",
        examples=["last"],
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        description="Sampling weight of the task, relative to those of the others.",
        examples=[2.0],
    )
    limit: dict[Split, int] = Field(
        default_factory=dict,
        description="Largest number of rows in each group (source locale: in each language); the "
        "seed decides which.",
        examples=[{"test": 100}],
    )
    task_group: int | None = Field(
        default=None,
        ge=0,
        description="Group of experts that adapter.router_task_loss_coef prefers for this task; "
        "null: the tasks take the groups in turn.",
        examples=[1],
    )
    long_rows: Literal["error", "cut"] = Field(
        default="error",
        description="What happens to a row that is longer than training.max_length: an error, or "
        "the start of its prompt is cut.",
        examples=["cut"],
    )
    metrics: list[str] | None = Field(
        default=None,
        description=f"Metrics of `rotmole eval`, any of {', '.join(METRICS)}; null means those of "
        "the format.",
        examples=[["exact_match", "chrf"]],
    )


class ExpertsFromSection(Section):
    """Trained LoRA adapters that become the experts; routers and rotation gates are trained."""

    paths: list[Annotated[str, AfterValidator(os.path.expanduser)]] = Field(
        default_factory=list,
        description="Folders of LoRA adapters, run folders, or ids on the hub; each is one expert. "
        "RotMoLE adapters with one expert and rotation none are LoRA too. Without paths, experts "
        "start anew.",
        examples=[["runs/math", "me/code-lora"]],
    )
    names: list[str] | None = Field(
        default=None,
        description="Name of each expert in reports; null takes those of the folders.",
        examples=[["math", "code"]],
    )
    trainable: Literal["gates", "all"] = Field(
        default="gates",
        description="What is trained: routers and rotation gates (gates), or the experts too "
        "(all).",
        examples=["all"],
    )


class DataSection(Section):
    """The mixture of tasks."""

    root: str = Field(
        default=".", description="Folder of the relative names in `files`.", examples=["data"]
    )
    tasks: dict[str, TaskSection] = Field(
        min_length=1,
        description="Task name -> its settings.",
        examples=[{"sums": {"source": "jsonl", "files": {"train": "sums.jsonl"}}}],
    )
    temperature: float | None = Field(
        default=None,
        gt=0,
        description="The share of a task in an epoch is proportional to weight * rows^(1 / "
        "temperature), weight 1 if it has none: 1 keeps the tasks' sizes, a large number makes "
        "them equal. null uses each row once, or, if a task has a weight, shares by weight only.",
        examples=[2.0],
    )


class OptimizerSection(Section):
    """Optimizers of our own, and learning rates by role; null means training.learning_rate."""

    name: Literal["riemannian_adamw", "riemannian_sgd", "muon"] | None = Field(
        default=None,
        description="Optimizer that preconditions the experts' gradients (riemannian_...) or "
        "makes them orthogonal (muon, AdamW for all else); null: training.optim.",
        examples=["riemannian_adamw"],
    )
    riemannian_delta: float | None = Field(
        default=None,
        gt=0,
        description="d of the preconditioner (B B^T + d I)^-1; null means 1e-6.",
        examples=[1e-4],
    )
    scaling_gate_lr: float | None = Field(
        default=None, ge=0, description="Learning rate of the scaling gates.", examples=[1e-3]
    )
    rotation_gate_lr: float | None = Field(
        default=None, ge=0, description="Learning rate of the rotation gates.", examples=[1e-3]
    )
    lora_plus_ratio: float | None = Field(
        default=None,
        gt=0,
        description="Learning rate of B divided by that of A (LoRA+); null means 1.",
        examples=[16.0],
    )
    expert_lr_by_load: Literal["none", "sqrt"] = Field(
        default="none",
        description="Whether the learning rate of each expert (A, B and its rotation gate) is "
        "multiplied by sqrt(E share), where share is the running share of the tokens' choices that "
        "it gets (sqrt; between 0.25 and 2).",
        examples=["sqrt"],
    )


class EvaluationSection(Section):
    """What `rotmole eval` does after or without training, and validation while training."""

    split: Split = Field(
        default="validation", description="Split that is scored.", examples=["test"]
    )
    limit: int | None = Field(
        default=None,
        gt=0,
        description="Largest number of rows of each task and group; null means all.",
        examples=[200],
    )
    max_new_tokens: int = Field(
        default=64, gt=0, description="Largest number of tokens of an answer.", examples=[16]
    )
    batch_size: int = Field(
        default=16,
        gt=0,
        description="Rows in a batch; answers are generated for four times as many. Batches are "
        "smaller where so many rows would not fit into half of the free memory.",
        examples=[4],
    )
    examples_in_prompt: int = Field(
        default=0,
        ge=0,
        description="Number of solved train rows at the start of each prompt.",
        examples=[3],
    )
    before: bool = Field(
        default=True,
        description="Whether the base model without the adapter is scored too.",
        examples=[False],
    )
    validation_limit: int | None = Field(
        default=None,
        gt=0,
        description="Largest number of rows of each task and group that validation scores while "
        "training; the seed decides which. null means all.",
        examples=[200],
    )
    early_stopping_patience: int | None = Field(
        default=None,
        gt=0,
        description="Training stops after this number of validations in a row without a better "
        "training.metric_for_best_model; null: it goes on to its end.",
        examples=[3],
    )
    report_tokens: int = Field(
        default=1000,
        ge=0,
        description="Number of tokens that `rotmole train` looks at when it ends, to write "
        "report.html (see `rotmole inspect`), and of those that it fits a static LoRA on; 0 writes "
        "none.",
        examples=[4000],
    )


class RunFile(Section):
    """One run."""

    output_dir: Annotated[str, AfterValidator(os.path.expanduser)] = Field(
        min_length=1,
        description="Folder that the run writes to; it is made if it does not exist.",
        examples=["runs/1"],
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,  # NumPy's limit
        description="Seed of initial weights, dropout, sampling and the order of rows.",
        examples=[1],
    )
    model: ModelSection = Field(default_factory=ModelSection, description="The base model.")
    init_from: str | None = Field(
        default=None,
        min_length=1,
        description="Adapter folder, or run folder, whose adapter is trained on, such as one that "
        "`rotmole grow` wrote. Its settings are those of the run; `adapter:` may change those that "
        "act in training alone.",
        examples=["runs/grown"],
    )
    adapter: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of RotMoleConfig, or of the method that peft_type names.",
    )
    experts_from: ExpertsFromSection = Field(
        default_factory=ExpertsFromSection, description="Trained adapters as experts."
    )
    data: DataSection = Field(description="The tasks to train on, at least one.")
    training: dict[str, Any] = Field(
        default_factory=dict, description="Settings of TRL's SFTConfig."
    )
    optimizer: OptimizerSection = Field(
        default_factory=OptimizerSection, description="Optimizer and learning rates by role."
    )
    evaluation: EvaluationSection = Field(
        default_factory=EvaluationSection,
        description="Settings of `rotmole eval` and of validation.",
    )
    _adapter_config: Any = PrivateAttr(default=None)
    _config_settings: dict[str, Any] = PrivateAttr(default_factory=dict)

    def set_adapter(self, settings: dict[str, Any], config: PeftConfig) -> None:
        """Set the `adapter:` section and the configuration that was made of it."""
        self.adapter = settings
        self._config_settings, self._adapter_config = copy.deepcopy(settings), config

    @property
    def adapter_config(self) -> PeftConfig:
        """The adapter's configuration as it was checked; copy it before PEFT changes it.

        Raises:
            ConfigError: `load_run` did not check this run, or its adapter section changed since.
        """
        if self._adapter_config is None or self._config_settings != self.adapter:
            raise ConfigError("the adapter section was not checked; read the run with load_run")
        config: PeftConfig = self._adapter_config
        return config
