"""The requests of the OpenAI interface that the server takes: fields, ranges, what is refused.

An unknown field is an error, so no setting is silently ignored. The fields of the interface that
the server does not have may be sent with the value that changes nothing, as clients do.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from rotmole.serving.engine import Sampling

_NO_OBJECT = "must be a JSON object, sent as Content-Type: application/json"
_SEEDS = (-(1 << 63), (1 << 63) - 1)


def _false(value: bool) -> bool:
    if value:
        raise ValueError("this server does not have it; leave it out")
    return value


# not Literal, to which 0 is equal to False and True to 1
No = Annotated[bool, AfterValidator(_false), WithJsonSchema({"type": "boolean", "const": False})]
One = Annotated[int, Field(ge=1, le=1)]
Zero = Annotated[float, Field(ge=0.0, le=0.0)]
Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _json_object(text: str, name: str) -> dict[str, Any]:
    with suppress(json.JSONDecodeError, RecursionError):
        if isinstance(found := json.loads(text), dict):
            return found
    raise ValueError(f"{name} must be the JSON of an object")


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Part):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Called(_Part):
    """The function of a tool call."""

    name: str
    arguments: str = Field(description="JSON of an object.")

    @field_validator("arguments")
    @classmethod
    def _is_object(cls, value: str) -> str:
        _json_object(value, "arguments")
        return value


class ToolCall(_Part):
    """One call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: Called


class Message(_Part):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # an answer of the server may be sent back as it is
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)


class Described(_Part):
    """The description of a function."""

    name: Text
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Part):
    """A function that the model may call, for chat templates that write them."""

    type: Literal["function"]
    function: Described


class StreamOptions(_Part):
    """The last part of a stream always has the usage."""

    include_usage: bool | None = None


class TextFormat(_Part):
    """The format of the answer: text."""

    type: Literal["text"]


class Request(_Part):
    """What both kinds of requests have."""

    model: str = Field(description="A name that /v1/models lists.")
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        le=_SEEDS[1],
        description="The most tokens of the answer; null is 1024, or what the model has room for.",
    )
    temperature: float | None = Field(
        default=None, ge=0.0, le=2.0, description="0 and null are greedy."
    )
    top_p: Share | None = None
    seed: int | None = Field(
        default=None,
        ge=_SEEDS[0],
        le=_SEEDS[1],
        description="Of the sampling; null is 0. The same request has the same answer.",
    )
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = Field(
        default=None, description="Texts that end the answer and are not part of it."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, description="Not used.")
    n: One | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    # JSON as `transformers chat` sends it: see Configuration
    generation_config: SkipJsonSchema[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _is_unicode(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError(_NO_OBJECT)  # noqa: TRY004 - pydantic reports no TypeError
        try:
            json.dumps(given, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:  # JSON can write half a surrogate pair
            raise ValueError("the text has half a surrogate pair, which is no character") from None
        return given

    @model_validator(mode="after")
    def _read_configuration(self) -> Request:
        self._configured()  # raises
        return self

    def most_tokens(self) -> int | None:
        """Return the most tokens that the answer may have, None if the request does not say."""
        return self.max_tokens

    def sampling(self) -> Sampling:
        """Return how the tokens of the answer are chosen."""
        given = self._configured()
        stop = self.stop if self.stop is not None else given.get("stop_strings") or ()
        temperature = given.get("temperature", 1.0) if given.get("do_sample") else 0.0
        return Sampling(
            max_new_tokens=self.most_tokens() or given.get("max_new_tokens"),
            temperature=temperature if self.temperature is None else self.temperature,
            top_p=given.get("top_p", 1.0) if self.top_p is None else self.top_p,
            seed=self.seed or 0,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )

    def _configured(self) -> dict[str, Any]:
        if self.generation_config is None:
            return {}
        given = _json_object(self.generation_config, "generation_config")
        kept = {name: value for name, value in given.items() if value is not None}
        for name in ("transformers_version", "_from_model_config"):
            kept.pop(name, None)
        try:
            return Configuration(**kept).model_dump(exclude_none=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"generation_config.{place}: {first['msg']}") from None


class Configuration(_Part):
    """The settings that a generation configuration may have."""

    max_new_tokens: int | None = Field(default=None, ge=1, le=_SEEDS[1])
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Share | None = None
    stop_strings: Text | list[Text] | None = None


class ChatRequest(Request):
    """A request for the next message of a chat."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=_SEEDS[1], description="The newer name of max_tokens."
    )
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    response_format: TextFormat | None = None
    logprobs: No | None = None

    def most_tokens(self) -> int | None:
        """Return the most tokens that the answer may have, by the newer name first."""
        return self.max_completion_tokens or self.max_tokens

    def body(self) -> dict[str, Any]:
        """Return what transformers' handler reads."""
        tools = None if self.tool_choice == "none" else self.tools
        return {
            "model": self.model,
            "messages": [message.model_dump(exclude_none=True) for message in self.messages],
            "tools": tools and [tool.model_dump(exclude_none=True) for tool in tools],
            "stream": self.stream,
            "sampling": self.sampling(),
        }


class TextRequest(Request):
    """A request for the continuation of a text."""

    prompt: str
    best_of: One | None = None
    echo: No | None = None
    suffix: Literal[""] | None = None
    logprobs: None = None

    def body(self) -> dict[str, Any]:
        """Return what transformers' handler reads."""
        return {
            "model": self.model,
            "prompt": self.prompt,
            "stream": self.stream,
            "sampling": self.sampling(),
        }


class LoadRequest(_Part):
    """What `transformers chat` asks before the first message."""

    model: str
