"""How answers are generated: in one growing and shrinking batch, or one after the other.

This file and handlers.py are all that serving takes from transformers' internals:
tests/serving/test_internals.py says which of them a new version has moved.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import queue
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cli.serving.utils import CBStreamer
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from rotmole.errors import InputError, ModelError
from rotmole.evaluation.generation import continuation
from rotmole.serving.answers import Answer
from rotmole.serving.memory import BLOCK
from rotmole.serving.models import Served

logger = logging.getLogger(__name__)

DEFAULT_TOKENS = 1024
"""The most tokens of an answer if a request does not say."""

BATCH_TOKENS = 512
"""The most tokens that one step of the batch reads, on a processor; long prompts take several."""

STOP_SECONDS = 10.0


@dataclass
class Sampling:
    """How the tokens of one answer are chosen; the same as `rotmole generate` does.

    Attributes:
        max_new_tokens: the most tokens; None is `DEFAULT_TOKENS`, or what there is room for.
        temperature: 0 is greedy.
        top_p: sample from the smallest set of tokens with at least this probability.
        seed: of the sampling.
        stop: texts that end the answer and are not part of it.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


class _Choice:
    """The tokens of one sampled answer, chosen as generate() chooses them for one prompt."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(sampling.seed)
        self._warpers = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Choice:
        return self  # a request that is put back into the queue goes on with its random numbers

    def __call__(self, scores_V: torch.Tensor) -> torch.Tensor:
        """Return scores whose only finite one is the token's."""
        scores_1V = scores_V[None]
        for warper in self._warpers:
            scores_1V = warper(None, scores_1V)
        token_11 = torch.multinomial(scores_1V.softmax(-1), 1, generator=self._generator)
        chosen_1V = torch.full_like(scores_1V, -torch.inf)
        return chosen_1V.scatter_(1, token_11, 0.0)[0]


class _Choices(ContinuousBatchingLogitsProcessorList):
    """Chooses the next token of every sampled answer in a batch that is greedy otherwise.

    transformers samples with one setting and one source of random numbers for the whole batch.
    """

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.supported_keys = {"choice": _Choice}
        self._choices: list[tuple[int, _Choice | None]] = []
        self._tokens = self._requests = 0

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: Any) -> Any:
        """Note for each request with a new token its last token and how the next one is chosen."""
        self._choices, self._tokens = [], 0
        self._requests = len(requests_in_batch)
        for request in requests_in_batch:
            self._tokens += request.query_length
            if request.has_new_token:
                choice = request.state.logit_processor_kwargs.get("choice")
                self._choices.append((self._tokens - 1, choice))
        return arg_storage

    def __call__(self, input_ids: Any, scores: torch.Tensor, logits_processor_args: Any) -> Any:
        """Return the scores; in the rows of sampled answers only that of one token is finite."""
        of_tokens = scores.shape[0] == self._tokens  # all that were read, else one of each request
        if self._tokens == self._requests:
            of_tokens = _SCORES_OF_TOKENS
        for place, (last, choice) in enumerate(self._choices):
            row = last if of_tokens else place
            if choice is not None:
                scores[row] = choice(scores[row])
        return scores


_SCORES_OF_TOKENS = (
    "requests_with_new_token"
    not in inspect.signature(ContinuousBatchingLogitsProcessor.prepare_tensor_args).parameters
)
"""Whether transformers computes the scores of all tokens that it reads, as it did in 5.10."""


class Engine:
    """Generates the answers of one model; a base class of both ways.

    Args:
        served: the model.
        room: the most tokens of one text, prompt and answer together.
    """

    def __init__(self, served: Served, room: int) -> None:
        self.served, self.room = served, room
        self._ends, self._strings = served.ends, served.strings
        self._rust = served.tokenizer._tokenizer

    def start(
        self, prompt: Sequence[int], sampling: Sampling, *, failure: Any = None, **parsing: Any
    ) -> Running:
        """Begin an answer; must be called on the event loop.

        Args:
            prompt: token ids; at least one.
            sampling: its max_new_tokens is set if it is None.
            failure: put into the queue of texts if the answer could not be generated.
            parsing: what transformers' streamer takes to tell tool calls from text.

        Raises:
            InputError: prompt and answer are longer than the room.
            RuntimeError: the engine has died.
        """
        left = self.room - len(prompt)
        if left < (sampling.max_new_tokens or 1):
            wanted = f" and {sampling.max_new_tokens} new ones" if sampling.max_new_tokens else ""
            raise InputError(
                f"the prompt's {len(prompt)} tokens{wanted} are more than the {self.room} that "
                "this server can read in one text; shorten the prompt or lower max_tokens"
            )
        if sampling.max_new_tokens is None:
            sampling.max_new_tokens = min(DEFAULT_TOKENS, left)
        key = uuid.uuid4().hex
        cancel = partial(self.cancel, key)
        loop = asyncio.get_running_loop()
        answer = Answer(
            self._ends,
            [*self._strings, *sampling.stop],
            lambda texts: CBStreamer(_Cancelling(cancel), key, self._rust, loop, texts, **parsing),
            cancel,
            tokenizer=self.served.tokenizer,
            plain=not any(parsing.values()),
            failure=failure,
        )
        self._begin(key, list(prompt), sampling, answer)
        return Running(answer, cancel)

    def is_alive(self) -> bool:
        """Tell whether the engine can answer."""
        raise NotImplementedError

    def cancel(self, key: str) -> None:
        """Stop generating an answer, of which nothing more is reported."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop generating anything."""
        raise NotImplementedError

    def _begin(self, key: str, prompt: list[int], sampling: Sampling, answer: Answer) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Running:
    """An answer that is being generated, and how to cancel it."""

    answer: Answer
    cancel: Callable[[], None]


@dataclass(frozen=True)
class _Cancelling:
    """What transformers' streamer calls when its client has gone."""

    cancel: Callable[[], None]

    def cancel_request(self, request_id: str) -> None:
        self.cancel()


class Batched(Engine):
    """Continuous batching: a request joins the batch when it comes and leaves it when it ends.

    Args:
        served: the model.
        tokens: what the key-value cache holds; a multiple of `BLOCK`.

    Raises:
        ModelError: transformers cannot run this model in such a batch.
    """

    def __init__(self, served: Served, tokens: int) -> None:
        # the last block takes the padding of a batch
        super().__init__(served, min(served.window, tokens - BLOCK))
        model = served.model
        on_gpu = model.device.type == "cuda"
        settings: dict[str, Any] = {"num_blocks": tokens // BLOCK, "use_cuda_graph": False}
        settings |= {"use_async_batching": False}  # choices are made on the host, step by step
        settings |= {} if on_gpu else {"max_batch_tokens": BATCH_TOKENS}
        greedy = GenerationConfig(
            do_sample=False, max_new_tokens=1, eos_token_id=self._ends or -1, use_cache=False,
            pad_token_id=served.tokenizer.pad_token_id,
        )  # fmt: skip
        try:
            self._manager = model.init_continuous_batching(
                generation_config=greedy,
                continuous_batching_config=ContinuousBatchingConfig(**settings),
            )
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise ModelError(f"{served.name}: no continuous batching: {error}") from error
        self._manager.logit_processor = _Choices()
        self._manager.start()
        self._try()

    def _try(self) -> None:
        """Generate one token, so that a model which cannot is known at the start."""
        self._manager.add_request([self._ends[0] if self._ends else 0], max_new_tokens=1)
        result = None
        while result is None and self._manager.is_running():
            result = self._manager.get_result(timeout=0.1)
        error = "its thread ended" if result is None else result.error
        if error is not None:
            self._manager.stop(block=True, timeout=STOP_SECONDS)
            raise ModelError(f"{self.served.name}: no continuous batching: {error}")

    def _begin(self, key: str, prompt: list[int], sampling: Sampling, answer: Answer) -> None:
        def deliver(output: Any) -> None:
            answer.take(output.generated_tokens)
            if output.error is not None or output.is_finished():
                answer.finish(output.error)

        options: dict[str, Any] = {}
        if sampling.temperature > 0:
            options["choice"] = _Choice(sampling, self.served.model.device)
        self._manager.register_result_handler(key, deliver)
        try:
            self._manager.add_request(
                prompt, request_id=key, max_new_tokens=sampling.max_new_tokens, streaming=True,
                eos_token_id=self._ends or -1, **options,
            )  # fmt: skip
        except BaseException:
            self._forget(key)
            raise

    def is_alive(self) -> bool:
        """Tell whether the thread that generates runs."""
        return bool(self._manager.is_running())

    def cancel(self, key: str) -> None:
        """Take an answer out of the batch before the next step."""
        if self._forget(key):
            self._manager.cancel_request(key)

    def _forget(self, key: str) -> bool:
        router = self._manager.output_router
        with router._lock:
            known = router.result_handlers.pop(key, None) is not None
        with suppress(queue.Empty):  # tokens of answers that were cancelled during a step
            while True:
                router.output_queue.get_nowait()
        return known

    def stop(self) -> None:
        """Stop after the step at work; answers that were not finished get an error."""
        self._manager.stop(block=True, timeout=STOP_SECONDS, hard_stop=True)


class _CancelledError(Exception):
    """Raised within generate() to leave it."""


class _Feed:
    """A transformers streamer that hands tokens to the event loop."""

    def __init__(self, answer: Answer, loop: asyncio.AbstractEventLoop) -> None:
        self.cancelled = threading.Event()
        self.answer, self.loop = answer, loop
        self._tokens: list[int] | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.cancelled.is_set():
            raise _CancelledError
        if self._tokens is None:  # the first are the prompt's
            self._tokens = []
            return
        self._tokens += value.tolist()
        self._call(self.answer.take, list(self._tokens))

    def end(self) -> None:
        """Do nothing: `finish` is called after errors, too."""

    def finish(self, error: str | None) -> None:
        self._call(self.answer.finish, error)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has been closed, so nobody waits for the answer
            self.cancelled.set()


class OneByOne(Engine):
    """Each answer by generate(), in the order of the requests.

    Args:
        served: the model.
    """

    def __init__(self, served: Served) -> None:
        super().__init__(served, served.window)
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._feeds: dict[str, _Feed] = {}
        self._thread = threading.Thread(target=self._work, name=f"answers of {served.name}")
        self._thread.start()

    def _begin(self, key: str, prompt: list[int], sampling: Sampling, answer: Answer) -> None:
        feed = _Feed(answer, asyncio.get_running_loop())
        self._feeds[key] = feed
        self._jobs.put(partial(self._generate, key, feed, prompt, sampling))

    def _generate(self, key: str, feed: _Feed, prompt: list[int], sampling: Sampling) -> None:
        error = None
        try:
            if not feed.cancelled.is_set():
                continuation(
                    self.served.model, self.served.tokenizer, prompt, streamer=feed,
                    max_new_tokens=sampling.max_new_tokens or DEFAULT_TOKENS,
                    temperature=sampling.temperature, top_p=sampling.top_p, seed=sampling.seed,
                )  # fmt: skip
        except _CancelledError:
            pass
        except Exception as reason:  # one answer's failure must not end the thread
            logger.exception("an answer of %s failed", self.served.name)
            error = str(reason)
        finally:
            self._feeds.pop(key, None)
            feed.finish(error)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def is_alive(self) -> bool:
        """Tell whether the thread that generates runs."""
        return self._thread.is_alive()

    def cancel(self, key: str) -> None:
        """Leave generate() at the next token."""
        feed = self._feeds.get(key)
        if feed is not None:
            feed.cancelled.set()

    def stop(self) -> None:
        """Cancel all answers and wait for the thread."""
        for feed in list(self._feeds.values()):
            feed.cancelled.set()
        self._jobs.put(None)
        self._thread.join(STOP_SECONDS)


def can_batch(served: Served) -> str | None:
    """Return why the answers of a model cannot be generated in one batch, None if they can.

    A batch is one long row of tokens that belong to different texts.
    """
    for config in getattr(served.model, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False):
            return "its adapter puts tokens before the prompt"
        if getattr(config, "selection", None) == "expert_choice":
            return "selection expert_choice compares the tokens of a text"
    return None
