"""What serving takes from transformers' internals is where it was; a failure says what has moved.

`serving/engine.py` and `serving/handlers.py` are the two files to change then.
"""

from __future__ import annotations

import dataclasses
import inspect
from importlib import import_module

import pytest

BATCHING = "transformers.generation.continuous_batching"
SERVING = "transformers.cli.serving"
# where it is: the parameters that serving gives it, or that it gives serving
CALLS = {
    f"{SERVING}.utils:CBStreamer": ("cb_manager", "request_id", "tokenizer", "loop", "queue"),
    f"{SERVING}.utils:CBStreamer.put": ("output",),
    f"{SERVING}.utils:CBStreamer.end": (),
    f"{SERVING}.utils:CBStreamer.cancel": (),
    f"{SERVING}.utils:_StreamError": ("msg",),
    f"{SERVING}.chat_completion:ChatCompletionHandler": ("model_manager", "generation_state"),
    f"{SERVING}.completion:CompletionHandler": ("model_manager", "generation_state"),
    f"{SERVING}.utils:BaseHandler._resolve_model": ("body",),
    f"{SERVING}.utils:BaseHandler._validate_request": ("body",),
    f"{SERVING}.utils:BaseHandler._build_generation_config": (
        "body", "model_generation_config", "use_cb",
    ),
    f"{SERVING}.utils:BaseGenerateManager.init_cb": ("model", "gen_config"),
    f"{SERVING}.utils:BaseGenerateManager.generate_streaming": (
        "model", "processor", "inputs", "gen_config", "request_id",
    ),
    f"{SERVING}.utils:BaseGenerateManager.generate_non_streaming": (
        "model", "processor", "inputs", "gen_config", "request_id",
    ),
    f"{SERVING}.utils:GenerationState.use_continuous_batching": ("model", "modality"),
    f"{SERVING}.utils:GenerationState.get_manager": ("model_id", "use_cb"),
    f"{SERVING}.model_manager:ModelManager.process_model_name": ("model_id",),
    f"{SERVING}.model_manager:ModelManager.load_model_and_processor": ("model_id_and_revision",),
    f"{SERVING}.model_manager:ModelManager.get_model_modality": ("model", "processor"),
    f"{BATCHING}:ContinuousBatchingManager.add_request": (
        "input_ids", "request_id", "max_new_tokens", "streaming", "eos_token_id",
    ),
    f"{BATCHING}:ContinuousBatchingManager.register_result_handler": ("request_id", "callback"),
    f"{BATCHING}:ContinuousBatchingManager.cancel_request": ("request_id",),
    f"{BATCHING}:ContinuousBatchingManager.get_result": ("timeout",),
    f"{BATCHING}:ContinuousBatchingManager.is_running": (),
    f"{BATCHING}:ContinuousBatchingManager.start": (),
    f"{BATCHING}:ContinuousBatchingManager.stop": ("block", "timeout", "hard_stop"),
    f"{BATCHING}.cb_logits_processors:ContinuousBatchingLogitsProcessorList": (
        "logits_processor",
    ),
    f"{BATCHING}.cb_logits_processors:ContinuousBatchingLogitsProcessorList.__call__": (
        "input_ids", "scores", "logits_processor_args",
    ),
    f"{BATCHING}.cb_logits_processors:ContinuousBatchingLogitsProcessorList.prepare_tensor_args": (
        "requests_in_batch", "arg_storage",
    ),
}  # fmt: skip
FIELDS = {
    "transformers:ContinuousBatchingConfig": (
        "num_blocks", "max_batch_tokens", "use_cuda_graph", "use_async_batching",
    ),
    f"{BATCHING}.requests:GenerationOutput": ("generated_tokens", "error"),
    f"{BATCHING}.requests:RequestState": ("logit_processor_kwargs",),
}  # fmt: skip


def found(place: str):
    module, _, path = place.partition(":")
    thing = import_module(module)
    for name in path.split("."):
        assert hasattr(thing, name), f"{place} has moved: no {name}"
        thing = getattr(thing, name)
    return thing


@pytest.mark.parametrize("place", CALLS)
def test_calls(place):
    parameters = set(inspect.signature(found(place)).parameters)
    missing = set(CALLS[place]) - parameters
    assert not missing, f"{place} takes no {missing} any more, but {parameters}"


@pytest.mark.parametrize("place", FIELDS)
def test_fields(place):
    fields = {field.name for field in dataclasses.fields(found(place))}
    missing = set(FIELDS[place]) - fields
    assert not missing, f"{place} has no {missing} any more"


def test_what_is_read_beside_calls_and_fields():
    assert {"state", "has_new_token", "query_length"} <= set(
        found(f"{BATCHING}.requests:FutureRequestState").__slots__
    )
    router = found(f"{BATCHING}.continuous_api:OutputRouter")()
    assert router.result_handlers == {}
    assert router.output_queue.empty()
    assert not router._lock.locked()
    assert found(f"{SERVING}.utils:Modality").LLM
