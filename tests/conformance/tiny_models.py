"""Tiny models and adapters in folders named like the hub ids that PEFT's tests ask for.

PEFT's tests call ``from_pretrained("owner/name")``. With the current folder holding
``owner/name/config.json`` and its weights, that finds the local folder and needs no network.
Everything is built from config, as small as the tests accept; weights are random and seeded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from rotmole import RotMoleConfig

VOCABULARY = 128
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_CAUSAL = {"vocab_size": VOCABULARY, **TOKENS}
_LLAMA = {
    **_CAUSAL,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_DEBERTA = {
    **_BERT,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": 16,
    "type_vocab_size": 0,
}
_OPT = {
    **_CAUSAL,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GPT = {**_CAUSAL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_BART = {
    **_CAUSAL,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}

_WHISPER = {
    **_BART,
    "vocab_size": VOCABULARY,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
}

# hub id -> (name of the transformers model class, name of its config class, config arguments)
MODELS: dict[str, tuple[str, str, dict[str, object]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_OPT, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32},
    ),
    # one test of tied embeddings has this model's width, 768, written into its body; those of
    # quantisation count 24 quantised layers, six in each of four blocks
    "peft-internal-testing/opt-125m": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            **_OPT,
            "hidden_size": 768,
            "word_embed_proj_dim": 768,
            "ffn_dim": 64,  # a block of 4-bit weights
            "num_hidden_layers": 4,
        },
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {**_GPT, "rotary_dim": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (
        "LlamaForCausalLM",
        "LlamaConfig",
        _LLAMA,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**_LLAMA, "num_labels": 1},
    ),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_LLAMA, "head_dim": 8},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "T5Config",
        _T5,
    ),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        _BART,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", _BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", _DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        "DebertaV2Model",
        "DebertaV2Config",
        _DEBERTA,
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        _BERT,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _BERT,
    ),
    "peft-internal-testing/tiny-random-Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _WHISPER,
    ),
}

# hub id -> (transformers class that loads the base model, base model, task type)
ADAPTERS: dict[str, tuple[str, str, str | None]] = {
    "peft-internal-testing/tiny-OPTForCausalLM-lora": (
        "AutoModelForCausalLM",
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "CAUSAL_LM",
    ),
    "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora": (
        "AutoModelForSeq2SeqLM",
        "peft-internal-testing/tiny-random-t5",
        "SEQ_2_SEQ_LM",
    ),
    "peft-internal-testing/tiny_OPTForSequenceClassification-lora": (
        "AutoModelForSequenceClassification",
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "SEQ_CLS",
    ),
    "peft-internal-testing/tiny_GPT2ForTokenClassification-lora": (
        "AutoModelForTokenClassification",
        "peft-internal-testing/tiny-random-GPT2LMHeadModel",
        "TOKEN_CLS",
    ),
    "peft-internal-testing/tiny_OPTForQuestionAnswering-lora": (
        "AutoModelForQuestionAnswering",
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "QUESTION_ANS",
    ),
    "peft-internal-testing/tiny_OPTForFeatureExtraction-lora": (
        "AutoModel",
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "FEATURE_EXTRACTION",
    ),
    "peft-internal-testing/tiny_WhisperForConditionalGeneration-lora": (
        "AutoModelForSpeechSeq2Seq",
        "peft-internal-testing/tiny-random-Whisper",
        None,
    ),
}

WITH_TOKENIZER = ("trl-internal-testing/tiny-random-LlamaForCausalLM",)


def build_models() -> None:
    """Write the models, tokenizers and adapters of the aimed tests to the current folder."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # new heads on tiny models are no news
    for model_id, (model_class, config_class, arguments) in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**arguments)
        build: Callable[..., transformers.PreTrainedModel] = getattr(transformers, model_class)
        build(config).save_pretrained(model_id)
    for model_id in WITH_TOKENIZER:
        _tokenizer().save_pretrained(model_id)
    for adapter_id, (auto_class, model_id, task_type) in ADAPTERS.items():
        torch.manual_seed(0)
        base = getattr(transformers, auto_class).from_pretrained(model_id)
        targets = ["q_proj", "v_proj"] if task_type is None else None
        _save_adapter(base, adapter_id, RotMoleConfig(task_type=task_type, target_modules=targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it saves the extended embedding: it shall
        _save_extended_adapter()
    # PEFT's config tests read another method's saved config through the class under test
    LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM").save_pretrained(
        "peft-internal-testing/tiny-opt-lora-revision"
    )


def _save_adapter(
    base: transformers.PreTrainedModel, adapter_id: str, config: RotMoleConfig
) -> None:
    get_peft_model(base, config).save_pretrained(adapter_id)


def _save_extended_adapter() -> None:
    """An adapter on a model whose vocabulary was extended, with the longer tokenizer beside it."""
    base_id = "peft-internal-testing/tiny-random-OPTForCausalLM"
    adapter_id = "peft-internal-testing/tiny-random-OPTForCausalLM-extended-vocab"
    base = transformers.AutoModelForCausalLM.from_pretrained(base_id)
    tokenizer = _tokenizer()
    tokenizer.add_tokens([f"<new-{index}>" for index in range(VOCABULARY)])
    base.resize_token_embeddings(len(tokenizer))
    _save_adapter(base, adapter_id, RotMoleConfig(task_type="CAUSAL_LM"))
    tokenizer.save_pretrained(adapter_id)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A word-level tokenizer of a few words."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(["this is a small test prompt with a few words"], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
