"""TRL's sft command for this method: `python -m rotmole.plugins.trl --adapter '{r: 4}' ...`.

`trl sft` makes a LoRA and can be told of no other type. This takes its arguments, but for those of
LoRA, and --adapter: settings between braces, or a YAML file with them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

from datasets import load_dataset
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_dataset,
    get_quantization_config,
)

from rotmole.errors import ConfigError, RotMoleError
from rotmole.plugins import adapter_config, changed, foreign, read_settings


@dataclass
class AdapterArguments:
    """The argument that takes the place of TRL's LoRA."""

    adapter: str = field(
        default="", metadata={"help": "Settings between braces, or a YAML file with them."}
    )


def lora_options() -> list[Field[Any]]:
    """Return the options by which TRL's command makes its own adapters."""
    heads = ("lora_", "use_peft", "use_rslora", "use_dora")
    return [option for option in fields(ModelConfig) if option.name.startswith(heads)]


def rows(script: ScriptArguments, mixture: DatasetMixtureConfig) -> Any:
    """Load the data set, as `trl sft` does.

    Raises:
        ConfigError: no data set is named, or two ways name one.
    """
    if bool(mixture.datasets) == bool(script.dataset_name):
        raise ConfigError("give --dataset_name, or datasets in a --config file, and not both")
    if mixture.datasets:
        return get_dataset(mixture)
    name = script.dataset_name
    return load_dataset(name, name=script.dataset_config, streaming=script.dataset_streaming)


def train(words: Sequence[str]) -> None:
    """Train as `trl sft` does, and save the adapter.

    Args:
        words: the command's arguments.

    Raises:
        ConfigError: for a setting that is wrong, or that this adapter would not follow.
    """
    kinds = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, AdapterArguments)
    parser = TrlParser(kinds, prog="python -m rotmole.plugins.trl")
    script, training, model, mixture, ours = parser.parse_args_and_config(
        args=list(words), fail_with_unknown_args=True
    )
    if given := changed(model, lora_options()):
        raise foreign(given, "TRL", "--adapter")
    config = adapter_config(read_settings(ours.adapter, "--adapter"), "--adapter")
    dataset = rows(script, mixture)
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    } | (training.model_init_kwargs or {})
    evaluates = training.eval_strategy != "no"
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if evaluates else None,
        quantization_config=get_quantization_config(model),
        peft_config=config,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


def main(words: Sequence[str]) -> int:
    """Train, and turn an error of ours into one sentence on stderr and an exit code."""
    try:
        train(words)
    except RotMoleError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
