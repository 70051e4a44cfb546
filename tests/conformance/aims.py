"""What PEFT's tests are aimed at: our configs in place of the ones upstream lists.

Every entry of `AIMS` replaces the values of one ``@pytest.mark.parametrize`` of one upstream
module (by its argument names, and by test name where a module uses the names twice). Nothing else
of a test is touched. The cases cover every kind of rotation and every way to name targets.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from rotmole import RotMoleConfig


class Aim(NamedTuple):
    """One parametrisation of one upstream module and the values it gets instead."""

    module: str
    names: str
    values: list[Any]
    tests: tuple[str, ...] = ("*",)

    def hits(self, module: str, test: str, names: str) -> bool:
        """Say whether this aim replaces the parametrisation `names` of `test` in `module`."""
        return (
            module == self.module
            and names.replace(" ", "") == self.names
            and any(fnmatchcase(test, pattern) for pattern in self.tests)
        )


# Upstream asks that every adapter parameter moves by more than 1e-4 within three steps of plain
# gradient descent (learning rate 0.5, inputs up to 89). An expert that none of its nine rows
# chooses would not, by design; so here both of two experts, or three of four, are chosen. The
# scale, lora_alpha / r, is such that these steps neither vanish nor overflow.
PAIR = {"num_experts": 2, "top_k": 2, "r": 4}
ONE = {"num_experts": 1, "r": 4}

CUSTOM_CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("tangent", "MLP", {"target_modules": "lin0", "lora_alpha": 1, **PAIR}),
    (
        "tangent, two layers",
        "MLP",
        {
            "target_modules": ["lin0", "lin1"],
            "rank_pattern": {"lin1": 2},
            "lora_alpha": 0.5,
            **PAIR,
        },
    ),
    (
        "tangent, three of four experts, dropout",
        "MLP",
        {"target_modules": ["lin0"], "lora_dropout": 0.1, "num_experts": 4, "top_k": 3, "r": 4},
    ),
    ("none", "MLP", {"target_modules": ["lin1"], "rotation": "none", "lora_alpha": 1, **PAIR}),
    ("plane", "MLP", {"target_modules": ["lin0"], "rotation": "plane", "lora_alpha": 4, **PAIR}),
    (
        "givens, regex",
        "MLP2",
        {"target_modules": r"lin\d", "rotation": "givens", "lora_alpha": 0.1, **PAIR},
    ),
    (
        "bias, modules to save",
        "MLP",
        {
            "target_modules": ["lin0"],
            "modules_to_save": ["lin1"],
            "rotation": "bias",
            "lora_alpha": 0.25,
            **PAIR,
        },
    ),
    (
        "bivector, Conv1D",
        "EmbConv1D",
        {"target_modules": ["conv1d"], "rotation": "bivector", **PAIR},
    ),
    (
        "tangent, trainable tokens",
        "EmbConv1D",
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}, **PAIR},
    ),
    (
        "cayley, one expert",
        "MLP_LayerNorm",
        {"target_modules": ["lin1"], "rotation": "cayley", "lora_alpha": 64, **ONE},
    ),
    (
        "tangent, grown",
        "MLP",
        {
            "target_modules": ["lin0"],
            "num_experts": 4,
            "top_k": 2,
            "r": 4,
            "experts_added": [2],
            "lora_alpha": 1,
        },
    ),
    (
        "shared expert, gated and turned",
        "MLP",
        {
            "target_modules": ["lin0", "lin1"],
            "shared_expert_r": 2,
            "shared_expert_gate": True,
            "shared_expert_rotation": "tangent",
            "routed_scaling_factor": 2.0,
            "lora_alpha": 1,
            **PAIR,
        },
    ),
    (
        "radar, dense",
        "MLP",
        {
            "target_modules": ["lin0"],
            "rotation": "radar",
            "selection": "dense",
            "lora_alpha": 1,
            **PAIR,
        },
    ),
]

# the last projection of attention and of the feed-forward block, in the words of every model here
OUTPUTS = ["fc2", "out_proj", "c_proj", "fc_out", "o_proj", "down_proj", "wo", "output.dense"]
TRANSFORMER_KWARGS: list[dict[str, Any]] = [
    {"target_modules": None, "r": 4},
    {"target_modules": OUTPUTS, "rotation": "givens", "r": 4, "num_experts": 2},
]


def _by_task(task_type: str) -> list[tuple[type, dict[str, Any]]]:
    return [(RotMoleConfig, {"task_type": task_type, **kwargs}) for kwargs in TRANSFORMER_KWARGS]


def _with_tokens(**kwargs: Any) -> RotMoleConfig:
    return RotMoleConfig(target_modules="all-linear", r=4, **kwargs)


def _pair_on(*targets: str, **kwargs: Any) -> dict[str, Any]:
    return {"target_modules": list(targets), "init_weights": False, **PAIR, **kwargs}


CUSTOM = [(name, model, RotMoleConfig, kwargs) for name, model, kwargs in CUSTOM_CASES]
TWO_ADAPTERS = [
    ("RotMoLE same", "rotmole", RotMoleConfig, _pair_on("lin0"), _pair_on("lin0")),
    ("RotMoLE different", "rotmole", RotMoleConfig, _pair_on("lin0"), _pair_on("lin1")),
    (
        "RotMoLE two rotations",
        "rotmole",
        RotMoleConfig,
        _pair_on("lin0", rotation="plane"),
        _pair_on("lin0", rotation="givens"),
    ),
]
# all experts are chosen: a quantised model chooses others, which says nothing of its layers
BLOCKS = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "lora_alpha": 1,
    **PAIR,
}
TOKENS = {"embed_tokens": [0, 1, 3]}
# every test but two of prompt learning (test_prompt_learning_*), which have lists of their own
NOT_PROMPTS = ("*.test_[!p]*", "*.test_p[!r]*", "*.test_pre*", "*.test_prompt_t*")
GEMMA = "hf-internal-testing/tiny-random-Gemma3ForCausalLM"
TASKS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
}

AIMS = [
    Aim("test_custom_models", "test_name,model_id,config_cls,config_kwargs", CUSTOM),
    Aim(
        "test_custom_models",
        "config_cls",
        [RotMoleConfig],
        (
            "TestPeftCustomModel.test_*modules*",
            "TestPeftCustomModel.test_set_requires_grad",
            "TestRequiresGrad.*",
            "TestDefaultTargetModules.*",
        ),
    ),
    Aim(
        "test_custom_models",
        "test_name,tuner_method,config_cls,config_kwargs_1,config_kwargs_2",
        TWO_ADAPTERS,
    ),
    Aim(
        "test_custom_models",
        "config0",
        [RotMoleConfig(**_pair_on("lin0")), RotMoleConfig(**_pair_on("lin0", rotation="plane"))],
        ("TestPeftCustomModel.test_adapter_name_makes_no_difference",),
    ),
    *(
        Aim(module, "config_cls,config_kwargs", _by_task(task_type), NOT_PROMPTS)
        for module, task_type in TASKS.items()
    ),
    Aim(
        "test_token_classification_qa",
        "config_cls,config_kwargs",
        _by_task("TOKEN_CLS"),
        ("TestTokenClassificationModels.*",),
    ),
    Aim(
        "test_token_classification_qa",
        "config_cls,config_kwargs",
        _by_task("QUESTION_ANS"),
        ("TestQuestionAnsweringModels.*",),
    ),
    Aim("test_quantization", "config_cls,config_kwargs", [(RotMoleConfig, BLOCKS)]),
    Aim("test_config", "config_class,mandatory_kwargs", [(RotMoleConfig, {})]),
    Aim("test_config", "config_class", [RotMoleConfig]),
    Aim(
        "test_low_level_api",
        "config",
        [RotMoleConfig(), RotMoleConfig(rotation="none", num_experts=1, top_k=1)],
        ("TestInjectAdapterFromStateDict.*",),
    ),
    Aim(
        "test_other",
        "config_cls,config_kwargs",
        [(RotMoleConfig, {"target_modules": "l1.*"})],
        ("TestAdapterTargeting.*",),
    ),
    Aim(
        "test_hub_features",
        "model_id,peft_config,tags,excluded_tags,pipeline_tag",
        [
            (GEMMA, RotMoleConfig(), ["transformers", f"base_model:adapter:{GEMMA}"], [], None),
            (
                GEMMA,
                RotMoleConfig(task_type="CAUSAL_LM"),
                ["transformers", f"base_model:adapter:{GEMMA}"],
                [],
                "text-generation",
            ),
        ],
    ),
    Aim(
        "test_trainable_tokens",
        "peft_config",
        [_with_tokens(trainable_token_indices=TOKENS)],
        tuple(
            f"TestTrainableTokens.{name}"
            for name in (
                "test_combined_with_peft_method_usage",
                "test_load_multiple_adapters",
                "test_no_embeddings_in_save_with_combined_usage",
                "test_weight_tying_noop_when_model_is_untied",
            )
        ),
    ),
    Aim(
        "test_trainable_tokens",
        "peft_config_factory",
        [
            lambda token_indices: _with_tokens(
                trainable_token_indices={"embed_tokens": token_indices}
            )
        ],
        ("TestTrainableTokens.test_multiple_adapters_different_token_indices",),
    ),
    Aim(
        "test_trainable_tokens",
        "peft_config,target_layer_name",
        [(RotMoleConfig(trainable_token_indices={"does-not-exist": [0, 1, 2]}), "does-not-exist")],
    ),
    Aim(
        "test_trainable_tokens",
        "peft_config",
        [_with_tokens(trainable_token_indices=TOKENS, modules_to_save=["embed_tokens"])],
        ("TestTrainableTokens.test_modules_to_save_excludes_trainable_tokens",),
    ),
    Aim(
        "test_trainable_tokens",
        "peft_config",
        [_with_tokens(trainable_token_indices=[1, 2, 3])],
        ("TestTrainableTokens.test_save_pretrained_auto",),
    ),
]

# Tests whose parameters name no method: one goes through every registered method, and those of
# test_auto load adapters by hub id; tiny_models.py puts RotMoLE adapters there. Five more touch
# no method at all, so there is no ground for leaving them out.
ALREADY_AIMED = {
    "test_config::TestPeftConfig.test_from_peft_type",
    "test_config::TestPeftConfig.test_adalora_config_correct_timing_still_works",
    "test_other::TestModulesToSaveAttributeAccess"
    ".test_transient_attribute_access_uninitialized_adapter",
    "test_other::TestPrepareModelForKbitTraining.test_auto_clear_cache_default",
    "test_other::TestPrepareModelForKbitTraining.test_auto_clear_cache_disabled",
    "test_other::TestPrepareModelForKbitTraining.test_fp32_cast",
    *(
        f"test_auto::TestPeftAutoModel.{name}"
        for name in (
            "test_peft_causal_lm",
            "test_peft_causal_lm_extended_vocab",
            "test_peft_seq2seq_lm",
            "test_peft_sequence_cls",
            "test_peft_token_classification",
            "test_peft_question_answering",
            "test_peft_feature_extraction",
            "test_peft_whisper",
            "test_import_allow_list_prevents_arbitrary_imports",
        )
    ),
}
MODULES = sorted({aim.module for aim in AIMS} | {name.split("::")[0] for name in ALREADY_AIMED})
