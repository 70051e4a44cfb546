"""From a run file to everything that training needs: the one place where the parts are wired."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import (
    PeftConfig,
    PeftModel,
    load_peft_weights,
    set_peft_model_state_dict,
)
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from trl import SFTConfig

from rotmole.config.load import sft_arguments
from rotmole.config.schema import DataSection, ModelSection, RunFile, Split
from rotmole.config.sections import early_stopping_problems
from rotmole.config.start import start_folder
from rotmole.config.training import NO_VALIDATION, best_problems, saves_when_it_validates
from rotmole.data import (
    Collator,
    Example,
    PackedCollator,
    PackedRows,
    encode_all,
    load_splits,
    mix,
    pack,
)
from rotmole.data.chat import today
from rotmole.data.load import within_limit
from rotmole.errors import AdapterError, ConfigError, DataError, ModelError
from rotmole.models.adapter import check_adapter_folder
from rotmole.models.limits import check_readable
from rotmole.models.load import LoadedModel, adapt, load_model
from rotmole.models.rows_apart import check_rows_apart
from rotmole.training.callbacks.balance import BiasCallback
from rotmole.training.callbacks.early import EarlyStopping
from rotmole.training.callbacks.gradients import GradientCallback
from rotmole.training.callbacks.metrics import JsonLinesCallback
from rotmole.training.callbacks.tensorboard import SameNamesCallback
from rotmole.training.callbacks.usage import UsageCallback
from rotmole.training.checkpoints.checkpoints import Checkpoints
from rotmole.training.folder.layout import METRICS
from rotmole.training.folder.manifest import run_date
from rotmole.training.trainer import RotMoleTrainer
from rotmole.tuner.config import RotMoleConfig
from rotmole.tuner.from_adapters import differing, put_experts
from rotmole.tuner.loras import Lora, base_problems, listed, read_loras
from rotmole.tuner.storage.fingerprint import base_fingerprint, compare_bases

UNLIMITED = 1 << 30
ExamplesBySplit = dict[Split, dict[str, list[Example]]]


@dataclass
class Built:
    """The parts of a run, wired.

    Attributes:
        run: the run file.
        base: the base model as loaded, with its tokenizer and note.
        model: the base with the adapter.
        examples: split -> task -> rows as text, every split that the tasks have.
        validation: task -> the validation rows that are scored while training.
        trainer: ready to train.
        date: ISO date on which chats were rendered.
    """

    run: RunFile
    base: LoadedModel
    model: PeftModel
    examples: ExamplesBySplit
    validation: dict[str, list[Example]]
    trainer: RotMoleTrainer
    date: str


class Sources:
    """Where a run takes its parts from; a comparison shares some among its runs.

    Args:
        trust_remote_code: let transformers run code that came with the model.
    """

    def __init__(self, *, trust_remote_code: bool = False) -> None:
        self.trust_remote_code = trust_remote_code

    def model(self, section: ModelSection, say: Callable[[str], None]) -> LoadedModel:
        """Load the base model; the run may change it."""
        return load_model(section, trust_remote_code=self.trust_remote_code, say=say)

    def examples(self, run: RunFile, tokenizer: Any, date: str) -> ExamplesBySplit:
        """Load every split that the tasks have: split -> task -> rows; without rows it is empty.

        Args:
            run: the run.
            tokenizer: the model's.
            date: ISO date that chat templates see as today's.
        """
        return load_splits(run.data, seed=run.seed, tokenizer=tokenizer, date=date)

    def adapted(self, run: RunFile, base: Any, *, resumes: bool) -> PeftModel:
        """Put the run's adapter on a base model; arguments as of `add_adapter`."""
        return add_adapter(run, base, resumes=resumes)


def build(
    run: RunFile,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    say: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
    sources: Sources | None = None,
    checkpoints: Checkpoints | None = None,
) -> Built:
    """Wire a run: model, adapter, data, trainer.

    Args:
        run: a checked run file.
        callbacks: beside those of every run (metric lines, use of the experts).
        say: told before slow steps.
        trust_remote_code: let transformers run code that came with the model.
        sources: of the run's parts; None loads them.
        checkpoints: of the run; None begins anew.

    Raises:
        InputError: model, adapter, data or training settings do not work together.
    """
    say = say or (lambda text: None)
    sources = sources or Sources(trust_remote_code=trust_remote_code)
    say(f"loading {run.model.name}")
    base = sources.model(run.model, say)
    say("loading data")
    origin = None if checkpoints is None else checkpoints.origin
    date = today() if origin is None else run_date(origin.parent)
    examples = sources.examples(run, base.tokenizer, date)
    if not any(examples["train"].values()):
        raise DataError("no task has a row in its train split; name files: {train: ...}.")
    model = sources.adapted(run, base.model, resumes=origin is not None)
    validation = validation_rows(run, examples["validation"])
    used = {"train": examples["train"], "validation": validation}
    trainer = build_trainer(run, model, base.tokenizer, used, callbacks, checkpoints)
    return Built(run, base, model, examples, validation, trainer, date)


def validation_rows(
    run: RunFile, examples: Mapping[str, list[Example]]
) -> dict[str, list[Example]]:
    """Choose the validation rows that are scored while training: evaluation.validation_limit.

    Args:
        run: the run; its seed decides which.
        examples: task -> all validation rows.

    Returns:
        Tasks that have rows -> at most that many rows of each group.
    """
    limit = run.evaluation.validation_limit
    chosen = {}
    for task, rows in examples.items():
        groups = [row.group for row in rows]
        places = within_limit(groups, limit, seed=f"{run.seed}|{task}|while training|")
        chosen[task] = [rows[i] for i in places]
    return {task: rows for task, rows in chosen.items() if rows}


def add_adapter(run: RunFile, base: Any, *, resumes: bool = False) -> PeftModel:
    """Put the run's adapter on a base model; run.seed decides its initial weights.

    With `init_from` they are those of the adapter it names; with `experts_from` the experts are.

    Args:
        run: a checked run file.
        base: the base model.
        resumes: the weights will come from a checkpoint.

    Raises:
        ConfigError: the settings do not fit the model.
        AdapterError, ModelError: an adapter of `init_from` or `experts_from` cannot be read,
            changed, or does not fit the model.
    """
    set_seed(run.seed)
    start = None
    if run.init_from is not None and not resumes:
        start = start_folder(run.init_from)
        saved = check_adapter_folder(start)
        name, here = saved.get("base_model_name_or_path"), base.config.name_or_path
        made_for, now = saved.get("base_fingerprint") or {}, base_fingerprint(base)
        notice = compare_bases(made_for, now, name, here)
        if notice and made_for.get("final_norm") != now["final_norm"]:  # not only another place
            warnings.warn(f"init_from: {notice}.", stacklevel=2)
    loras = _imported(run, base) if not resumes else []
    model = adapt(base, run.adapter_config)
    if loras:
        put_experts(model, loras, model.active_adapter)
    if start is not None:
        set_peft_model_state_dict(model, load_peft_weights(str(start), device="cpu"))
    # PEFT looks for a base model's configuration at every save: here, not on the hub
    model.active_peft_config.base_model_name_or_path = base.config.name_or_path
    return model


def _imported(run: RunFile, base: Any) -> list[Lora]:
    """Read the adapters of experts_from, and check them against run file and model."""
    loras = read_loras(run.experts_from.paths)
    if loras and (changes := differing(run.adapter_config, loras)):
        raise AdapterError(
            f"the adapters of experts_from are not those that this run file was made for: "
            f"{'; '.join(changes)}. Leave what they decide out of the adapter section."
        )
    if problems := base_problems(base, loras):
        raise ModelError(listed(problems))
    return loras


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
        examples: the rows to train on, by task, and those that validation scores.
        callbacks: besides those of every run.
        checkpoints: of the run; None begins anew.

    Raises:
        ConfigError, DataError: settings or rows that cannot be trained on.
    """
    validation = examples["validation"]
    arguments = training_arguments(run, validated=validation)
    length = arguments.max_length or UNLIMITED
    train = mix(dict(examples["train"]), run.data, seed=run.seed)
    groups = task_groups(run.data, model.peft_config[model.active_adapter])
    datasets = {"": tokenised(train, tokenizer, length, groups)}
    datasets |= {task: tokenised(rows, tokenizer, length) for task, rows in validation.items()}
    for task, dataset in datasets.items():
        places = [row.place for row in (validation[task] if task else train)]
        check_readable(model, tokenizer, zip(places, dataset["input_ids"], strict=True))
    trained: Any = datasets.pop("")
    if arguments.packing:
        lengths = [len(ids) for ids in trained["input_ids"]]
        trained = PackedRows(trained, pack(lengths, length, seed=run.seed))
    trainer = RotMoleTrainer(
        optimizer_section=run.optimizer,
        checkpoints=checkpoints,
        model=model,
        args=arguments,
        train_dataset=trained,
        eval_dataset=datasets or None,
        data_collator=collator(model, tokenizer, arguments),
        processing_class=tokenizer,
        callbacks=[
            BiasCallback(),
            UsageCallback(),
            GradientCallback(),
            JsonLinesCallback(Path(run.output_dir, METRICS)),
            *callbacks,
        ],
    )
    if run.evaluation.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(run.evaluation.early_stopping_patience))
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    _report_last(trainer)
    return trainer


def collator(model: PeftModel, tokenizer: Any, arguments: SFTConfig) -> Collator:
    """Return what makes batches of rows, packs or one sequence without padding.

    Raises:
        ModelError: rows are to share a sequence, and the model would let them see each other.
    """
    if not (arguments.packing or arguments.padding_free):
        return Collator(tokenizer, arguments.pad_to_multiple_of)
    attention = str(model.get_base_model().config._attn_implementation)
    # kernels of flash attention tell rows apart in a batch of one sequence only
    flat = arguments.padding_free or "flash" in attention
    check_rows_apart(model, flat=flat)
    return PackedCollator(tokenizer, arguments.pad_to_multiple_of, flat=flat)


def _report_last(trainer: RotMoleTrainer) -> None:
    """Let trackers see a log line when it is complete; TensorBoard gets metrics.jsonl's names."""
    for kind in get_reporting_integration_callbacks(trainer.args.report_to):
        tracker = trainer.pop_callback(kind)
        if kind is TensorBoardCallback:
            tracker = SameNamesCallback()
        if tracker is not None:
            trainer.add_callback(tracker)


def training_arguments(run: RunFile, *, validated: Collection[str]) -> SFTConfig:
    """Return the trainer's arguments; arguments and errors are those of `training_values`."""
    arguments = SFTConfig(**training_values(run, validated=validated))
    if arguments.n_gpu > 1:  # transformers would take nn.DataParallel, which splits no such batch
        warnings.warn(
            f"one of {arguments.n_gpu} GPUs is used; `torchrun --nproc-per-node "
            f"{arguments.n_gpu} -m rotmole_cli train ...` uses them all.",
            stacklevel=2,
        )
        arguments._n_gpu = 1
    return arguments


def training_values(run: RunFile, *, validated: Collection[str]) -> dict[str, Any]:
    """Complete the run's training settings by what depends on the data.

    Where there are validation rows, the checkpoint with the lowest validation loss is the result,
    if checkpoints are saved when validation runs.

    Args:
        run: the run.
        validated: names of the tasks that have validation rows.

    Returns:
        The trainer's arguments by name.

    Raises:
        ConfigError: a setting that only TRL's own trainer knows, or that needs validation rows
            which the data do not have.
    """
    values = sft_arguments(run) | {"disable_tqdm": True}
    values.setdefault("include_num_input_tokens_seen", "non_padding")
    if not validated:
        values |= {"eval_strategy": "no", "eval_steps": None, "load_best_model_at_end": False}
    elif values.get("eval_strategy", "no") != "no" and "load_best_model_at_end" not in values:
        values["load_best_model_at_end"] = saves_when_it_validates(values)
        if not values["load_best_model_at_end"] and values.get("save_strategy") != "no":
            warnings.warn(
                "the last checkpoint will be the result, not the best: training.save_strategy and "
                "save_steps must follow eval_strategy and eval_steps for that.",
                stacklevel=2,
            )
    if values.get("load_best_model_at_end"):
        values.setdefault("metric_for_best_model", "eval_loss")
    problems = early_stopping_problems(run.evaluation.model_dump(), values, bool(validated))
    if validated:
        problems += best_problems(values, validated)
    elif values.get("eval_on_start"):
        problems.append(f"training.eval_on_start: True needs {NO_VALIDATION}")
    if problems:
        raise ConfigError(problems)
    idle = [n for n, d in {"loss_type": "nll", "activation_offloading": False}.items()
            if values.get(n, d) != d]  # fmt: skip
    if idle:
        raise ConfigError([f"training.{name} is not supported; leave it out." for name in idle])
    return values


def task_groups(data: DataSection, config: PeftConfig) -> dict[str, int]:
    """Say which group of experts each task belongs to, where the localised loss is on.

    Args:
        data: the `data:` section; tasks without a task_group take the groups in turn.
        config: the adapter's settings.

    Returns:
        task -> group; empty where the loss is off.
    """
    if not isinstance(config, RotMoleConfig) or not config.router_task_loss_coef:
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
