"""What a request may ask for: every option is within limits, or it is refused with a sentence."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from prunus.options.declaration import words
from prunus.serving.gate import RequestError

#: Most prompts, messages, and parts of a message in one request.
_MAX_PROMPTS, _MAX_MESSAGES = 128, 10_000
#: Tokens of an answer to a request that sets no number.
DEFAULT_TOKENS = 1024

#: Options that would change the answer, and that a request may not have. A kind of request that
#: declares one of them has it.
_NOT_SUPPORTED = {
    "audio", "best_of", "echo", "frequency_penalty", "function_call", "functions",
    "generation_config", "logprobs", "modalities", "moderation", "n", "prediction",
    "presence_penalty", "response_format", "suffix", "tool_choice", "top_logprobs",
    "web_search_options",
}  # fmt: skip
#: Their values without any effect, where those are not empty or 0.
_NEUTRAL = {
    "best_of": 1, "function_call": "none", "modalities": ["text"], "n": 1,
    "response_format": {"type": "text"}, "tool_choice": "auto",
}  # fmt: skip
#: OpenAI's options that do not change which tokens this server chooses.
_WITHOUT_EFFECT = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "reasoning_effort", "safety_identifier", "service_tier", "store",
    "stream_options", "user", "verbosity",
}  # fmt: skip

_Count = Annotated[int, Field(ge=1, lt=2**31)]
# OpenAI takes four stop sequences. Long ones would only cost time for every token.
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Stops = Annotated[
    list[_Stop],
    Field(max_length=4),
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
]
# JSON writes token ids as text where they are names of fields.
_Token = Annotated[int, Field(strict=False, ge=0, lt=2**31)]
_Bias = Annotated[float, Field(ge=-100, le=100)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Options(_Strict):
    """Options that chats and texts share; see OpenAI's API for their meaning."""

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: _Count | None = None
    stop: _Stops | None = None
    logit_bias: Annotated[dict[_Token, _Bias], Field(max_length=300)] | None = None


class _Part(_Strict):
    model_config = ConfigDict(extra="ignore")

    type: Literal["text"]
    text: str


class _Message(_Strict):
    model_config = ConfigDict(extra="ignore")

    role: str
    content: str | Annotated[list[_Part], Field(max_length=_MAX_MESSAGES)] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _check_parts(cls, value: Any) -> Any:
        for part in value if isinstance(value, list) else ():
            if isinstance(part, dict) and part.get("type") != "text":
                raise ValueError(
                    f"a part of type {str(part.get('type'))[:40]!r} cannot be read; this model "
                    "takes text only"
                )
        return value


class ChatOptions(Options):
    messages: Annotated[list[_Message], Field(min_length=1, max_length=_MAX_MESSAGES)]
    max_completion_tokens: _Count | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None


class _Scored(Options):
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


def _list_prompts(prompt: Any) -> Any:
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return prompt if several else [prompt]


class TextOptions(_Scored):
    """A request to `/v1/completions`. `prompt` is a list, also where a single one was given."""

    prompt: Annotated[
        list[str | list[int]], Field(max_length=_MAX_PROMPTS), BeforeValidator(_list_prompts)
    ]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> TextOptions:
        if self.stream and (self.echo or self.logprobs is not None):
            raise RequestError(
                400, "stream: echo and logprobs cannot be streamed; leave it out", param="stream"
            )
        if self.max_tokens == 0 and not self.echo:
            raise RequestError(400, "max_tokens: 0 tokens need echo", param="max_tokens")
        return self


class Work(_Scored):
    """What is computed for a request: its prompts as token ids, and options that were checked."""

    model_config = ConfigDict(extra="ignore")

    prompts: list[list[int]]
    texts: list[str] | None = None  #: the text of each prompt, where `echo` asks for it
    is_chat: bool = False  #: whether reasoning and calls of tools are told from the answer's text
    max_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None


_Kind = TypeVar("_Kind", bound=Options)


def parse_options(kind: type[_Kind], body: bytes) -> _Kind:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise RequestError(400, "the body must be a JSON object, sent as application/json")
    for name in _NOT_SUPPORTED - kind.model_fields.keys():
        if (value := content.pop(name, None)) and value != _NEUTRAL.get(name):
            raise RequestError(
                400, f"{name} is not supported by this server; leave it out", param=name
            )
    try:
        found = kind.model_validate(
            {name: value for name, value in content.items() if name not in _WITHOUT_EFFECT}
        )
    except ValidationError as fault:
        first = fault.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"])[:200]
        raise RequestError(400, f"{place}: {words(first)}", param=place) from fault
    return found
