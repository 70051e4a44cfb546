"""The committed list: every upstream test that is deselected or skipped, and why."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from typing import NamedTuple


class Listed(NamedTuple):
    """`count` items of the tests that match `tests`; for a skip, with `said` in its reason."""

    tests: str
    count: int
    why: str
    said: str = ""


LORA = "builds LoraConfig in its body or fixture"
OTHER = "builds another method's config (named in the test) in its body"
TOKENS = "builds TrainableTokensConfig (a method of its own) or LoraConfig in its body"
PROMPTS = "a list of prompt-learning configs, which adapt no layer"
MIXED = "LoRA, RoAd and GLoRA: different adapters for the rows of a batch, which RotMoLE refuses"
MERGING = "merges LoRA (or the method in its name) in its body"
PICKLES = "loads adapter_model.bin, a pickle, which RotMoLE refuses to open"
DROPPED = "RotMoLE drops a foreign auto_mapping with a warning before PEFT's own refusal"
HUB = "needs a hub repository"

_CUSTOM = "test_custom_models::TestPeftCustomModel.test_"
_GRAD = "test_custom_models::TestRequiresGrad.test_"
_DECODER = "test_decoder_models::TestDecoderModels.test_"
_TOKENS = "test_trainable_tokens::TestTrainableTokens.test_"

# The first entry that matches counts; so the narrow ones come first.
DESELECTED = [
    Listed("test_auto::*.test_embedding_size_not_reduced_*", 1, LORA + "; " + HUB),
    Listed("test_config::*.test_nested_config_survives_*", 7, "LoRA's nested configs"),
    Listed("test_config::*.test_adalora_config_*", 13, OTHER),
    Listed("test_config::*.test_ia3_*", 2, OTHER),
    Listed("test_config::*.test_from_pretrained_cache_dir_remote", 1, HUB),
    Listed("test_config::*.test_lora_config_layers_to_transform_validation", 1, LORA),
    Listed("test_config::*.test_regex_with_layer_indexing_lora", 1, LORA),
    Listed("test_config::*.test_prompt_encoder_warning_num_layers", 1, OTHER),
    Listed("test_custom_models::TestDefaultTargetModules.*_osf", 1, OTHER),
    Listed("test_custom_models::TestDynamicDispatch.*", 6, "LoRA's own dispatch of custom layers"),
    Listed("test_custom_models::TestLayerRepr.test_repr_lora_*", 5, LORA),
    Listed("test_custom_models::TestMixedAdapterBatches.*", 36, MIXED),
    Listed("test_custom_models::TestMultiRankAdapter.*", 2, LORA),
    Listed("test_custom_models::TestMultipleActiveAdapters.*_dora_*", 15, MERGING),
    Listed(_CUSTOM + "add_weighted_adapter_*", 64, "LoRA's weighted sums of adapters"),
    Listed(_CUSTOM + "*merge*", 17, MERGING),
    Listed(_CUSTOM + "*merging*", 3, MERGING),
    Listed(_CUSTOM + "*pvera*", 3, OTHER),
    Listed(_CUSTOM + "*monteclora*", 2, OTHER),
    Listed(_CUSTOM + "*gralora*", 1, OTHER),
    Listed(_CUSTOM + "dora_save_and_load_remapping", 1, LORA),
    Listed(_CUSTOM + "set_requires_grad_trainable_tokens", 1, OTHER),
    Listed(_CUSTOM + "add_adapter_rejects_duplicate_name_without_mutation", 2, LORA),
    Listed(_CUSTOM + "delete_adapter_*multiple_adapters_*", 3, LORA),
    Listed(_CUSTOM + "*existing_model_card", 2, LORA),
    Listed(_CUSTOM + "ignore_mismatched_sizes_with_scalar_modules_to_save", 1, LORA),
    Listed(_CUSTOM + "load_resized_embedding_ignore_mismatched_sizes", 1, LORA),
    Listed(_CUSTOM + "*_similarly_named_sibling", 2, LORA),
    Listed(_CUSTOM + "mha_gradients_set_correctly", 2, "LoRA on nn.MultiheadAttention"),
    Listed(_CUSTOM + "unload_adapter_multihead_attention", 1, "LoRA on nn.MultiheadAttention"),
    Listed(_CUSTOM + "*_trainable_token_indices*", 3, LORA),
    Listed(_CUSTOM + "multiple_adapters_automatic_modules_to_save", 1, LORA + "; " + HUB),
    Listed(_CUSTOM + "multiple_adapters_no_needless_copy_modules_to_save", 1, LORA),
    Listed(_CUSTOM + "save_pretrained_targeting_lora_to_embedding_layer*", 12, LORA),
    Listed(_CUSTOM + "weight_bias_attributes", 1, LORA),
    Listed(_GRAD + "requires_grad_lora_*", 4, LORA),
    Listed(_GRAD + "requires_grad_modules_to_save_*", 3, LORA),
    Listed(_GRAD + "requires_grad_follows_inference_mode_*", 2, LORA),
    Listed(_GRAD + "requires_grad_*", 30, OTHER),
    Listed(_GRAD + "loading_*", 3, LORA),
    Listed(_DECODER + "prefix_tuning_*", 7, OTHER),
    Listed(_DECODER + "prompt_learning_with_gradient_checkpointing", 25, PROMPTS),
    Listed(_DECODER + "prompt_tuning_*", 4, OTHER),
    Listed(_DECODER + "generate_adalora_no_dropout", 1, OTHER),
    Listed(_DECODER + "*", 11, LORA),
    Listed("test_encoder_decoder_models::*.test_active_adapters_prompt_learning", 1, OTHER),
    Listed("test_*::*.test_prompt_learning_forward_with_inputs_embeds", 6, PROMPTS),
    Listed("test_encoder_decoder_models::*.test_*", 2, LORA),
    Listed("test_feature_extraction_models::*.test_load_model_low_cpu_mem_usage", 1, LORA),
    Listed("test_hub_features::TestBaseModelRevision.*", 3, LORA + "; " + HUB),
    Listed("test_hub_features::*", 4, LORA),
    Listed("test_low_level_api::*.*_rejects_shared_state_tuners", 6, OTHER),
    Listed("test_low_level_api::TestInjectAdapterFromStateDict.*", 13, LORA + "; some: " + HUB),
    Listed("test_low_level_api::*.test_base_model_module_named_like_peft_prefix", 2, OTHER),
    Listed("test_low_level_api::TestGetBaseModelStateDict.*", 3, LORA),
    Listed("test_low_level_api::TestLowLevelFunctional.*", 3, LORA),
    Listed("test_low_level_api::TestPeftStateDict.*", 15, LORA),
    Listed("test_low_level_api::TestStateDictFsdpShapeValidation.*", 2, LORA),
    Listed("test_other::TestGetNoSplitModules.*", 2, HUB),
    Listed("test_other::TestGetModuleNamesTiedWithEmbedding.*", 18, HUB),
    Listed("test_other::TestModulesToSave*", 12, LORA),
    Listed("test_other::TestTargetingAuxiliaryTrainingWrapper.*", 4, LORA),
    Listed("test_other::test_*", 6, LORA),
    Listed(_TOKENS + "*merging*", 4, MERGING),
    Listed(_TOKENS + "*merge*", 2, MERGING),
    Listed(_TOKENS + "multiple_adapters_mixed_forward", 1, MIXED),
    Listed(_TOKENS + "weight_tying_applied_when_model_is_tied*", 5, MERGING),
    Listed(_TOKENS + "basic_training", 1, TOKENS),
    Listed(_TOKENS + "composite_model_*", 2, TOKENS),
    Listed(_TOKENS + "*embedding_name_*", 9, TOKENS),
    Listed(_TOKENS + "embed_scale_is_applied", 1, TOKENS),
    Listed(_TOKENS + "ensure_weight_tying_*", 10, LORA),
    Listed(_TOKENS + "multiple_targets", 1, TOKENS),
    Listed(_TOKENS + "multiple_trainable_token_adapters_same_model", 1, TOKENS),
    Listed(_TOKENS + "original_module_not_in_state_dict", 1, TOKENS),
    Listed(_TOKENS + "scaled_embedding_with_lora", 1, LORA),
    Listed(_TOKENS + "stand_alone_*", 2, TOKENS),
    Listed(_TOKENS + "targeting_both_embedding_and_tied_layer_explicitly", 1, LORA),
    Listed(_TOKENS + "*tied_model_*_no_ensure", 4, LORA),
    Listed(_TOKENS + "weight_tying_bc_*", 2, LORA),
    Listed(_TOKENS + "weight_tying_state_dict_ignores_tied_weights", 1, TOKENS),
]

NO_MERGE = "RotMoLE's update depends on the token, so there is no weight to merge into"
NO_BIAS = "RotMoLE does not train the base layer's bias: it has no `bias` setting"
NOT_A_PROMPT = "prompt-learning methods only"
NO_ROWS = "upstream runs mixed-adapter batches for LoRA (and RoAd) only"
NO_WEIGHTED = "upstream adds up adapters of LoRA and IA3 only"
CONV1D = "upstream's own list of methods with Conv1D; GPT-2 is covered by every other test"

# Upstream asserts what RotMoLE refuses on purpose; the plug-in skips these, with these reasons.
REFUSED = {
    "*.test_save_pretrained*_pickle": PICKLES,
    "*.test_import_allow_list_prevents_arbitrary_imports": DROPPED,
    "TestQuantization.test_merge_unmerge_unload": NO_MERGE,
}

SKIPPED = [
    Listed("test_*::*.test_save_pretrained*_pickle", 57, PICKLES, PICKLES),
    Listed("test_auto::*.test_import_allow_list_prevents_*", 7, DROPPED, DROPPED),
    Listed("test_quantization::*.test_merge_unmerge_unload", 4, NO_MERGE, NO_MERGE),
    Listed("test_*::*", 212, NO_MERGE, "RotMoLE does not support merging"),
    Listed(_DECODER + "merge_*", 16, NO_MERGE, "layers have no bias term"),
    Listed("test_*::*.test_adding_multiple_adapters_with_bias_raises", 29, NO_BIAS, "'bias'"),
    Listed(_CUSTOM + "disable_adapter_with_bias_warns", 13, NO_BIAS, "only for LoraConfig or BOFT"),
    Listed("test_custom_models::*_learnable_bias", 26, NO_BIAS, "training the bias directly"),
    Listed(
        _CUSTOM + "active_adapter",
        2,
        "modules_to_save and trainable tokens of two adapters cannot both be active",
        "Multiple active adapters",
    ),
    Listed("test_decoder_models::*", 6, CONV1D, "does not support Conv1D"),
    Listed("test_*::*_mixed_adapter_batches", 32, NO_ROWS, "Mixed adapter batches not supported"),
    Listed("test_*::*.test_weighted_combination_of_adapters", 24, NO_WEIGHTED, "not applicable"),
    Listed("test_*::*.test_training_prompt_learning_tasks", 24, NOT_A_PROMPT, "not applicable"),
    Listed("test_*::*.test_prompt_tuning_*", 30, NOT_A_PROMPT, "does not apply"),
    Listed(
        _DECODER + "set_requires_grad_prompt_learning_raises", 2, NOT_A_PROMPT, "only for prompt"
    ),
    Listed(
        "test_feature_*.test_passing_input_embeds_works", 8, NOT_A_PROMPT, "not prompt learning"
    ),
]

# Whole modules that are not run.
LEFT_OUT = {
    **dict.fromkeys(
        [
            "test_adamss_asa",
            "test_adaption_prompt",
            "test_arrow",
            "test_bdlora",
            "test_boft",
            "test_cartridge",
            "test_cpt",
            "test_deft",
            "test_frod",
            "test_lora_conversion",
            "test_lora_ga",
            "test_lora_intruders",
            "test_lora_megatron",
            "test_lora_variants",
            "test_lorafa",
            "test_loraplus",
            "test_multitask_prompt_tuning",
            "test_osf",
            "test_poly",
            "test_pvera",
            "test_randlora",
            "test_riemannian_lora",
            "test_shadow",
            "test_shira",
            "test_supertuning",
            "test_unilora",
            "test_vblora",
            "test_velora",
            "test_vera",
            "test_xlora",
        ],
        "named after another method, and every test builds that method's config",
    ),
    **dict.fromkeys(
        ["test_helpers", "test_initialization", "test_mapping", "test_mixed", "test_tuners_utils"],
        "every test that reaches a tuner builds LoRA's or another method's config in its body",
    ),
    "test_target_parameters": "LoRA's target_parameters, which no other method has",
    "test_integrations": "LoRA on mixture-of-experts hub repositories",
    "test_bufferdict": "a container of PEFT's own; no method, no config",
    "test_incremental_pca": "an algorithm of PEFT's EVA initialisation; no method, no config",
    **dict.fromkeys(
        ["test_common_gpu", "test_gptqmodel", "test_gpu_examples"],
        "needs a GPU and hub repositories",
    ),
    "test_stablediffusion": "needs a Stable Diffusion hub repository",
    "test_torch_compile": "needs a data set from the hub",
    "test_vision_models": "needs a data set from the hub",
}


def problems(deselected: Counter[str], skipped: Counter[tuple[str, str]]) -> list[str]:
    """Compare what happened with the lists, in both directions and by number."""
    found = [(test, "", count) for test, count in deselected.items()]
    seen = [(test, reason, count) for (test, reason), count in skipped.items()]
    return _compare("deselected", DESELECTED, found) + _compare("skipped", SKIPPED, seen)


def _compare(what: str, listed: list[Listed], seen: list[tuple[str, str, int]]) -> list[str]:
    counts = [0] * len(listed)
    wrong = []
    for test, reason, count in sorted(seen):
        index = next(
            (
                position
                for position, entry in enumerate(listed)
                if fnmatchcase(test, entry.tests) and entry.said in reason
            ),
            None,
        )
        if index is None:
            wrong.append(f"{what}, not listed: {count} x {test} {reason}".rstrip())
        else:
            counts[index] += count
    for entry, count in zip(listed, counts, strict=True):
        if count != entry.count:
            wrong.append(f"{what}: {count} items, listed {entry.count}: {entry.tests} {entry.said}")
    return wrong
