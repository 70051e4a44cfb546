"""From a run file to everything that training needs: the one place where the parts are wired."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from trl import SFTConfig

from rotmole.config.load import sft_arguments
from rotmole.config.schema import DataSection, RunFile, Split
from rotmole.data import Collator, Example, encode_all, load_splits, mix
from rotmole.data.chat import today
from rotmole.errors import ConfigError, DataError
from rotmole.models.limits import check_readable
from rotmole.models.load import LoadedModel, load_model
from rotmole.training.callbacks.balance import BiasCallback
from rotmole.training.callbacks.metrics import JsonLinesCallback
from rotmole.training.callbacks.usage import UsageCallback
from rotmole.training.checkpoints.checkpoints import Checkpoints
from rotmole.training.folder.layout import METRICS
from rotmole.training.folder.manifest import run_date
from rotmole.training.trainer import RotMoleTrainer
from rotmole.tuner.config import RotMoleConfig

UNLIMITED = 1 << 30


@dataclass
class Built:
    """The parts of a run, wired.

    Attributes:
        run: the run file.
        base: the base model as loaded, with its tokenizer and note.
        model: the base with the adapter.
        examples: split -> task -> rows as text, every split that the tasks have.
        trainer: ready to train.
        date: ISO date on which chats were rendered.
    """

    run: RunFile
    base: LoadedModel
    model: PeftModel
    examples: dict[Split, dict[str, list[Example]]]
    trainer: RotMoleTrainer
    date: str


def build(
    run: RunFile,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    say: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
    checkpoints: Checkpoints | None = None,
) -> Built:
    """Wire a run: model, adapter, data, trainer.

    Args:
        run: a checked run file.
        callbacks: beside those of every run (metric lines, use of the experts).
        say: told before slow steps.
        trust_remote_code: let transformers run code that came with the model.
        checkpoints: of the run; None begins anew.

    Raises:
        InputError: model, adapter, data or training settings do not work together.
    """
    say = say or (lambda text: None)
    say(f"loading {run.model.name}")
    base = load_model(run.model, trust_remote_code=trust_remote_code, say=say)
    say("loading data")
    origin = None if checkpoints is None else checkpoints.origin
    date = today() if origin is None else run_date(origin.parent)
    examples = all_examples(run, base.tokenizer, date=date)
    model = add_adapter(run, base.model)
    trainer = build_trainer(run, model, base.tokenizer, examples, callbacks, checkpoints)
    return Built(run, base, model, examples, trainer, date)


def all_examples(
    run: RunFile, tokenizer: Any, *, date: str | None = None
) -> dict[Split, dict[str, list[Example]]]:
    """Load every split that the tasks have.

    Args:
        run: the run.
        tokenizer: the model's.
        date: ISO date that chat templates see as today's; None is today's.

    Returns:
        split -> task -> rows; a split without rows is empty.

    Raises:
        DataError: no task has a row to train on.
    """
    examples = load_splits(run.data, seed=run.seed, tokenizer=tokenizer, date=date)
    if not any(examples["train"].values()):
        raise DataError("no task has a row in its train split; name files: {train: ...}.")
    return examples


def add_adapter(run: RunFile, base: Any) -> PeftModel:
    """Put the run's adapter on a base model; run.seed decides its initial weights.

    Raises:
        ConfigError: the settings do not fit the model.
    """
    set_seed(run.seed)
    return get_peft_model(base, copy.deepcopy(run.adapter_config))  # PEFT changes it


def build_trainer(
    run: RunFile,
    model: PeftModel,
    tokenizer: Any,
    examples: Mapping[Split, Mapping[str, list[Example]]],
    callbacks: Sequence[TrainerCallback] = (),
    checkpoints: Checkpoints | None = None,
) -> RotMoleTrainer:
    """Wire the trainer; transformers' own progress and printing are off.

    Args:
        run: a checked run file.
        model: base with adapter.
        tokenizer: the model's.
        examples: from `all_examples`.
        callbacks: besides those of every run.
        checkpoints: of the run; None begins anew.

    Raises:
        ConfigError, DataError: settings or rows that cannot be trained on.
    """
    validation = {task: rows for task, rows in examples["validation"].items() if rows}
    arguments = training_arguments(run, validated=bool(validation))
    length = arguments.max_length or UNLIMITED
    train = mix(dict(examples["train"]), run.data, seed=run.seed)
    groups = task_groups(run.data, model.peft_config[model.active_adapter])
    datasets = {"": tokenised(train, tokenizer, length, groups)}
    datasets |= {task: tokenised(rows, tokenizer, length) for task, rows in validation.items()}
    for task, dataset in datasets.items():
        places = [row.place for row in (validation[task] if task else train)]
        check_readable(model, tokenizer, zip(places, dataset["input_ids"], strict=True))
    trainer = RotMoleTrainer(
        optimizer_section=run.optimizer,
        checkpoints=checkpoints,
        model=model,
        args=arguments,
        train_dataset=datasets.pop(""),
        eval_dataset=datasets or None,
        data_collator=Collator(tokenizer, arguments.pad_to_multiple_of),
        processing_class=tokenizer,
        callbacks=[
            BiasCallback(),
            UsageCallback(),
            JsonLinesCallback(Path(run.output_dir, METRICS)),
            *callbacks,
        ],
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    return trainer


def training_arguments(run: RunFile, *, validated: bool) -> SFTConfig:
    """Complete the run's training settings by what depends on the data.

    Where there are validation rows, the checkpoint with the lowest validation loss is the result,
    if checkpoints are saved when validation runs.

    Args:
        run: the run.
        validated: whether there are validation rows.

    Returns:
        The trainer's arguments.

    Raises:
        ConfigError: a setting that only TRL's own trainer knows.
    """
    values = sft_arguments(run) | {"disable_tqdm": True}
    values.setdefault("include_num_input_tokens_seen", "non_padding")
    if not validated:
        values |= {"eval_strategy": "no", "eval_steps": None, "load_best_model_at_end": False}
    elif values.get("eval_strategy", "no") != "no" and "load_best_model_at_end" not in values:
        values["load_best_model_at_end"] = _saves_when_it_validates(values)
    if values.get("load_best_model_at_end"):
        values.setdefault("metric_for_best_model", "eval_loss")
    idle = [n for n, d in {"loss_type": "nll", "activation_offloading": False}.items()
            if values.get(n, d) != d]  # fmt: skip
    if idle:
        raise ConfigError([f"training.{name} is not supported; leave it out." for name in idle])
    arguments = SFTConfig(**values)
    if arguments.n_gpu > 1:  # transformers would take nn.DataParallel, which splits no such batch
        warnings.warn(
            f"one of {arguments.n_gpu} GPUs is used; `torchrun --nproc-per-node "
            f"{arguments.n_gpu} -m rotmole_cli train ...` uses them all.",
            stacklevel=2,
        )
        arguments._n_gpu = 1
    return arguments


def chooses_by_validation(run: RunFile) -> bool:
    """Tell whether the result of a run with validation rows is the checkpoint that they choose."""
    values = sft_arguments(run)
    if values.get("eval_strategy", "no") == "no":
        return False
    if "load_best_model_at_end" in values:
        return bool(values["load_best_model_at_end"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training says it
        return _saves_when_it_validates(values)


def _saves_when_it_validates(values: Mapping[str, Any]) -> bool:
    """Tell whether each checkpoint has a validation loss; warn where the best cannot be known."""
    save, validate = values.get("save_strategy"), values["eval_strategy"]
    if save == "best" or (save == validate and save == "epoch"):
        return True
    if save == validate == "steps":
        steps = values.get("save_steps", 500), values.get("eval_steps") or values["logging_steps"]
        if round(steps[0] * 10**6) % round(steps[1] * 10**6) == 0:
            return (steps[0] < 1) == (steps[1] < 1)
    if save != "no":
        warnings.warn(
            "the last checkpoint will be the result, not the best: training.save_strategy and "
            "save_steps must follow eval_strategy and eval_steps for that.",
            stacklevel=2,
        )
    return False


def task_groups(data: DataSection, config: RotMoleConfig) -> dict[str, int]:
    """Say which group of experts each task belongs to, where the localised loss is on.

    Args:
        data: the `data:` section; tasks without a task_group take the groups in turn.
        config: the adapter's settings.

    Returns:
        task -> group; empty where the loss is off.
    """
    if not config.router_task_loss_coef:
        return {}
    groups = config.router_task_groups
    return {
        name: number % groups if task.task_group is None else task.task_group
        for number, (name, task) in enumerate(data.tasks.items())
    }


def tokenised(
    rows: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    groups: Mapping[str, int] | None = None,
) -> Dataset:
    """Turn rows of text into token ids, keeping task and id beside them.

    Args:
        rows: the rows, in order.
        tokenizer: the model's.
        max_length: most tokens of a row.
        groups: from `task_groups`, for training only.

    Returns:
        Columns input_ids, labels, task, group, id and, with groups, task_id.

    Raises:
        DataError: a row is too long or has nothing to learn.
    """
    encoded = encode_all(rows, tokenizer, max_length=max_length)
    ids: list[dict[str, Any]] = [{"id": row.id} for row in rows]
    if groups:
        ids = [
            {**column, "task_id": groups[row.task]} for column, row in zip(ids, rows, strict=True)
        ]
    return Dataset.from_list([{**e, **i} for e, i in zip(encoded, ids, strict=True)])
