"""Where a setting lives: other tools' names for it, and settings written in the wrong section."""

from __future__ import annotations

from functools import cache
from typing import Any

from rotmole.config.adapter import REFUSED as ADAPTER_REFUSED
from rotmole.config.adapter import adapter_hints
from rotmole.config.schema import RunFile, TaskSection
from rotmole.config.training import REFUSED as TRAINING_REFUSED
from rotmole.config.training import training_hints

TASK = "data.tasks.NAME"

# What axolotl, LLaMA-Factory, unsloth, PEFT, TRL and older versions of transformers call a setting.
OTHER_NAMES: dict[str, str] = {
    # optimisation
    "lr": "training.learning_rate",
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "n_epochs": "training.num_train_epochs",
    "train_epochs": "training.num_train_epochs",
    "steps": "training.max_steps",
    "num_steps": "training.max_steps",
    "max_train_steps": "training.max_steps",
    "num_training_steps": "training.max_steps",
    "iters": "training.max_steps",
    "batch_size": "training.per_device_train_batch_size",
    "train_batch_size": "training.per_device_train_batch_size",
    "micro_batch_size": "training.per_device_train_batch_size",
    "micro_batch": "training.per_device_train_batch_size",
    "per_gpu_train_batch_size": "training.per_device_train_batch_size",
    "eval_batch_size": "evaluation.batch_size",
    "grad_accum": "training.gradient_accumulation_steps",
    "accumulation_steps": "training.gradient_accumulation_steps",
    "grad_accumulation_steps": "training.gradient_accumulation_steps",
    "gradient_accumulation": "training.gradient_accumulation_steps",
    "warmup": "training.warmup_steps",
    "warmup_ratio": "training.warmup_steps",
    "lr_warmup_steps": "training.warmup_steps",
    "num_warmup_steps": "training.warmup_steps",
    "scheduler": "training.lr_scheduler_type",
    "lr_scheduler": "training.lr_scheduler_type",
    "lr_schedule": "training.lr_scheduler_type",
    "wd": "training.weight_decay",
    "clip_grad": "training.max_grad_norm",
    "grad_clip": "training.max_grad_norm",
    "gradient_clipping": "training.max_grad_norm",
    "max_norm": "training.max_grad_norm",
    "beta1": "training.adam_beta1",
    "beta2": "training.adam_beta2",
    "betas": "training.adam_beta1",
    "eps": "training.adam_epsilon",
    "label_smoothing": "training.label_smoothing_factor",
    "loraplus_lr_ratio": "optimizer.lora_plus_ratio",
    "loraplus_lr_embedding": "optimizer.lora_plus_ratio",
    "shared_expert_rank": "adapter.shared_expert_r",
    "shared_expert_dim": "adapter.shared_expert_r",
    "router_lr": "optimizer.scaling_gate_lr",
    "expert_lr": "optimizer.expert_lr_by_load",
    "expert_lr_scaling": "optimizer.expert_lr_by_load",
    # lengths and order of rows
    "max_seq_length": "training.max_length",
    "max_seq_len": "training.max_length",
    "max_sequence_length": "training.max_length",
    "seq_len": "training.max_length",
    "seq_length": "training.max_length",
    "sequence_len": "training.max_length",
    "sequence_length": "training.max_length",
    "cutoff_len": "training.max_length",
    "block_size": "training.max_length",
    "context_length": "training.max_length",
    "model_max_length": "training.max_length",
    "truncation": f"{TASK}.long_rows",
    "group_by_length": "training.train_sampling_strategy",
    "sample_packing": "training.packing",
    "neat_packing": "training.packing",
    "train_on_inputs": f"{TASK}.loss_on",
    "train_on_prompt": f"{TASK}.loss_on",
    "mask_inputs": f"{TASK}.loss_on",
    # saving and validation
    "evaluation_strategy": "training.eval_strategy",
    "save_every": "training.save_steps",
    "checkpoint_steps": "training.save_steps",
    "saves_per_epoch": "training.save_steps",
    "evals_per_epoch": "training.eval_steps",
    "eval_every": "training.eval_steps",
    "log_every": "training.logging_steps",
    "log_steps": "training.logging_steps",
    "keep_checkpoints": "training.save_total_limit",
    "output": "output_dir",
    "out_dir": "output_dir",
    "output_path": "output_dir",
    "save_dir": "output_dir",
    "save_path": "output_dir",
    "random_seed": "seed",
    "random_state": "seed",
    "logger": "training.report_to",
    "wandb": "training.report_to",
    "wandb_project": "training.report_to",
    # the base model
    "base_model": "model.name",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "model_id": "model.name",
    "pretrained_model_name_or_path": "model.name",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "mixed_precision": "training.bf16",
    "amp": "training.bf16",
    "float16": "training.fp16",
    "bfloat16": "training.bf16",
    "flash_attention": "model.attn_implementation",
    "flash_attn": "model.attn_implementation",
    "use_flash_attention_2": "model.attn_implementation",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "quantization_bit": "model.quantization",
    "quantization_config": "model.quantization",
    "bnb_4bit_quant_type": "model.quantization",
    "use_gradient_checkpointing": "training.activation_checkpointing",
    "grad_checkpoint": "training.activation_checkpointing",
    # the adapter
    "rank": "adapter.r",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "alpha": "adapter.lora_alpha",
    "dropout": "adapter.lora_dropout",
    "rslora": "adapter.use_rslora",
    "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "lora_target_linear": "adapter.target_modules",
    "lora_modules_to_save": "adapter.modules_to_save",
    "additional_target": "adapter.modules_to_save",
    "init_lora_weights": "adapter.init_weights",
    "method": "adapter.preset",
    "experts": "adapter.num_experts",
    "n_experts": "adapter.num_experts",
    "num_local_experts": "adapter.num_experts",
    "expert_num": "adapter.num_experts",
    "lora_num": "adapter.num_experts",
    "moe_num_experts": "adapter.num_experts",
    "k": "adapter.top_k",
    "topk": "adapter.top_k",
    "num_experts_per_tok": "adapter.top_k",
    "num_experts_per_token": "adapter.top_k",
    "moe_topk": "adapter.top_k",
    "routed_scale": "adapter.routed_scaling_factor",
    "moe_routed_scaling_factor": "adapter.routed_scaling_factor",
    "moe_router_topk_scaling_factor": "adapter.routed_scaling_factor",
    "aux_loss_coef": "adapter.router_aux_loss_coef",
    "load_balance_coef": "adapter.router_aux_loss_coef",
    "balance_loss_coef": "adapter.router_aux_loss_coef",
    "z_loss_coef": "adapter.router_z_loss_coef",
    "gate": "adapter.router",
    # data
    "datasets": "data.tasks",
    "train_file": f"{TASK}.files",
    "train_files": f"{TASK}.files",
    "train_data": f"{TASK}.files",
    "data_path": f"{TASK}.files",
    "data_files": f"{TASK}.files",
    "validation_file": f"{TASK}.files",
    "val_file": f"{TASK}.files",
    "test_file": f"{TASK}.files",
    "dataset_dir": "data.root",
    "data_dir": "data.root",
    "dataset_name": f"{TASK}.dataset",
    "dataset_path": f"{TASK}.dataset",
    "val_set_size": f"{TASK}.validation_fraction",
    "val_size": f"{TASK}.validation_fraction",
    "eval_split": f"{TASK}.validation_fraction",
    "test_size": f"{TASK}.validation_fraction",
    "validation_split": f"{TASK}.validation_fraction",
    "max_samples": f"{TASK}.limit",
    "template": f"{TASK}.prompt",
    "prompt_template": f"{TASK}.prompt",
    "prompt_column": f"{TASK}.prompt",
    "response_column": f"{TASK}.completion",
    "answer_template": f"{TASK}.completion",
    "field_messages": f"{TASK}.messages_column",
    "mixing_temperature": "data.temperature",
    # evaluation
    "max_tokens": "evaluation.max_new_tokens",
    "num_fewshot": "evaluation.examples_in_prompt",
    "fewshot": "evaluation.examples_in_prompt",
    "max_eval_samples": "evaluation.limit",
}

HINTS: dict[str, str] = {
    "warmup_ratio": "below 1 it is a share of all updates",
    "load_in_4bit": "write model.quantization: bnb-4bit-nf4",
    "load_in_8bit": "write model.quantization: bnb-8bit",
    "quantization_bit": "write bnb-4bit-nf4 or bnb-8bit",
    "group_by_length": "write training.train_sampling_strategy: group_by_length",
    "train_on_inputs": "write loss_on: all",
    "train_on_prompt": "write loss_on: all",
    "wandb": "write training.report_to: wandb",
    "wandb_project": "write training.report_to: wandb",
    "lora_target_linear": "write adapter.target_modules: all-linear",
    "betas": "and training.adam_beta2",
}
"""How the value is written, where the name alone does not say it."""


@cache
def places() -> dict[str, str]:
    """Return a setting's full name by its last part, of all sections and of other tools' names.

    >>> places()["lora_rank"], places()["learning_rate"], places()["attn_implementation"]
    ('adapter.r', 'training.learning_rate', 'model.attn_implementation')
    """
    full_names: dict[str, str] = {}
    for name, field in RunFile.model_fields.items():
        section: Any = field.annotation
        if hasattr(section, "model_fields"):
            full_names |= {key: f"{name}.{key}" for key in section.model_fields}
    full_names |= {key: f"{TASK}.{key}" for key in TaskSection.model_fields}
    full_names |= {k: f"adapter.{k}" for k in adapter_hints() if k not in ADAPTER_REFUSED}
    training = {k: f"training.{k}" for k in training_hints() if k not in TRAINING_REFUSED}
    # a name that is a setting of the model, the data or the adapter too means that
    full_names = training | full_names | {name: name for name in RunFile.model_fields}
    return full_names | OTHER_NAMES


def did_you_mean_place(key: str, section: str) -> str:
    """Suggest where a setting that a section does not have is written.

    Args:
        key: what the user wrote.
        section: the full name of the section, "" at the top of the file.

    Returns:
        "; did you mean training.learning_rate?", or the empty string.

    >>> did_you_mean_place("lr", "training")
    "; did you mean 'training.learning_rate'?"
    >>> did_you_mean_place("load-in-4bit", "")
    "; did you mean 'model.quantization'? (write model.quantization: bnb-4bit-nf4)"
    """
    plain = key.strip().lower().replace("-", "_")
    name = places().get(plain)
    if name is None or name == (f"{section}.{key}" if section else key):
        return ""
    hint = f" ({HINTS[plain]})" if plain in HINTS else ""
    return f"; did you mean {name!r}?{hint}"
