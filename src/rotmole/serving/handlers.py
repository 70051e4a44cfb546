"""The handlers of transformers' server, fed by our models, our prompts and our engines.

They write the answers: as one object or as a stream, with tool calls and reasoning told apart
where the tokenizer or the model's kind says how. This file and engine.py are all that serving
takes from transformers' internals.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import Modality, _StreamError

from rotmole.data.chat import chat_prompt
from rotmole.evaluation.generation import prompt_tokens
from rotmole.serving.engine import Engine, Running, Sampling
from rotmole.serving.models import Served

SORRY = "the answer could not be generated; the server's log has the reason"


class Prompts:
    """A tokenizer whose prompts are those of `rotmole generate`; all else is the tokenizer's."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._served.tokenizer, name)

    def __call__(self, prompt: str, **_: Any) -> dict[str, list[int]]:
        """Return the token ids of a text."""
        return {"input_ids": prompt_tokens(prompt, self._served.tokenizer)}

    def apply_chat_template(
        self, chat: Sequence[Mapping[str, Any]], *, tools: list[Any] | None = None, **_: Any
    ) -> dict[str, list[int]]:
        """Return the token ids of a chat up to where the answer begins."""
        served = self._served
        return self(chat_prompt(served.tokenizer, chat, date=served.date, tools=tools))


class Generation:
    """What a handler asks for answers: transformers' generation manager, by an engine of ours."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.running: dict[str, Running] = {}

    def init_cb(self, *_: Any) -> None:
        """Do nothing: the engine runs already."""

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Sampling, request_id: str,
        **parsing: Any,
    ) -> tuple[asyncio.Queue[Any], Any]:  # fmt: skip
        """Begin an answer; returns the queue of its texts and transformers' streamer."""
        answer = self._start(inputs, gen_config, request_id, parsing).answer
        return answer.queue, answer.writer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Sampling, request_id: str
    ) -> tuple[str, int, list[int]]:
        """Return the text of an answer, the length of its prompt, and its tokens."""
        answer = self._start(inputs, gen_config, request_id, {}).answer
        await answer.done.wait()
        if answer.error is not None:
            raise HTTPException(500, SORRY)
        return answer.text(), len(inputs["input_ids"]), answer.tokens

    def cancel(self, request_id: str) -> None:
        """Forget a request, and generate no more of its answer if it is not complete."""
        running = self.running.pop(request_id, None)
        if running is not None:
            running.cancel()

    def _start(
        self, inputs: Any, sampling: Sampling, request_id: str, parsing: dict[str, Any]
    ) -> Running:
        running = self.engine.start(
            inputs["input_ids"], sampling, failure=_StreamError(SORRY), **parsing
        )
        self.running[request_id] = running
        return running


class Shelf:
    """The models of a server by name: transformers' model manager and generation state at once.

    Args:
        engines: one for each model.
    """

    force_model = None

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = {engine.served.name: engine for engine in engines}
        self._generations = {name: Generation(e) for name, e in self.engines.items()}
        self._prompts = {name: Prompts(e.served) for name, e in self.engines.items()}

    def process_model_name(self, name: str) -> str:
        """Return the name as it is: no revision belongs to it."""
        return name

    def load_model_and_processor(self, name: str, **_: Any) -> tuple[Any, Any]:
        """Return a model and what encodes its prompts.

        Raises:
            HTTPException: 404, there is no such model.
        """
        self.check(name)
        return self.engines[name].served.model, self._prompts[name]

    def check(self, name: str) -> None:
        """Refuse a name that is no model's.

        Raises:
            HTTPException: 404, with the names of all models.
        """
        if name not in self.engines:
            raise HTTPException(
                404, f"there is no model {name!r:.80}; the models are {', '.join(self.engines)}"
            )

    def get_model_modality(self, model: Any, processor: Any = None) -> Any:
        """Return that the models read and write text."""
        return Modality.LLM

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        """Return that prompts are lists of tokens, which every engine takes."""
        return True

    def get_manager(self, name: str, use_cb: bool = False) -> Generation:
        """Return what generates the answers of a model."""
        return self._generations[name]

    def cancel(self, name: str, request_id: str) -> None:
        """Forget a request, and generate no more of its answer if it is not complete."""
        self._generations[name].cancel(request_id)

    def is_alive(self) -> bool:
        """Tell whether every engine can answer."""
        return all(engine.is_alive() for engine in self.engines.values())


class _Ours:
    """What both handlers do in our way: the model's name, and how tokens are chosen."""

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        name = body["model"]
        return name, *self.model_manager.load_model_and_processor(name)  # type: ignore[attr-defined] # of the handler

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Sampling:
        """Return the sampling that our route has put in the place of the body's single fields."""
        sampling: Sampling = body["sampling"]
        return sampling

    def _validate_request(self, body: dict[str, Any]) -> None:
        """Do nothing: our route has checked the request."""


class ChatAnswers(_Ours, ChatCompletionHandler):  # type: ignore[misc] # another kind of settings
    """transformers' handler of /v1/chat/completions with our models."""


class TextAnswers(_Ours, CompletionHandler):  # type: ignore[misc] # another kind of settings
    """transformers' handler of /v1/completions with our models."""


def handlers(shelf: Shelf) -> tuple[ChatAnswers, TextAnswers]:
    """Return both handlers of a shelf of models."""
    return ChatAnswers(shelf, shelf), TextAnswers(shelf, shelf)
